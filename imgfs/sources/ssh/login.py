"""Logging in: imgfs's settings as asyncssh's options, and questions to the person."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import asyncssh

from imgfs.errors import UsageError
from imgfs.sources.ssh.settings import Prompt, SshSettings
from imgfs.url.source import SshUrl

#: AES in hardware is about twice as fast as chacha20, OpenSSH's default, in asyncssh.
CIPHERS = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr"]
CIPHERS += ["aes256-ctr", "chacha20-poly1305@openssh.com"]
ATTEMPT_S = 10.0  # one attempt to get a TCP connection
ASKING_S = 120.0  # a person types
PASSWORD_TRIES = 3


class Answers:
    """The person's answers, kept in memory so that a connection can be made again unasked."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._known: dict[str, str] = {}
        #: why nothing else is to be asked, though the server would take a password; else empty
        self.gave_up = ""

    def ask(self, question: str) -> str | None:
        """[blocks] The answer, asked for once."""
        if question not in self._known:
            answer = self._prompt(question)
            if answer is None:
                return None
            self._known[question] = answer
        return self._known[question]

    def passphrase(self, file: str) -> str | None:
        """[blocks] What unlocks a private key.  `gave_up` is set when it does not."""
        answer = self.ask(f"passphrase of {file}: ")
        try:
            asyncssh.read_private_key(file, answer)
        except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
            self.gave_up = f"the passphrase of {file} is wrong"
            if answer is None:
                self.gave_up = f"{file} needs a passphrase"
        return answer

    def forget(self) -> None:
        """They were wrong."""
        self._known.clear()


class Client(asyncssh.SSHClient):
    """Answers password and keyboard-interactive questions of the server."""

    def __init__(self, answers: Answers, who: str) -> None:
        self._answers = answers
        self._who = who
        self._tries = 0
        self._rounds = 0

    async def password_auth_requested(self) -> str | None:
        return await self._ask(f"password of {self._who}: ")

    async def kbdint_auth_requested(self) -> str | None:
        self._rounds += 1
        return "" if self._rounds <= PASSWORD_TRIES else None

    async def kbdint_challenge_received(
        self, name: str, instructions: str, lang: str, prompts: Sequence[tuple[str, bool]]
    ) -> list[str] | None:
        answers = []
        for text, _ in prompts:
            answer = await self._ask(f"{self._who}: {text}")
            if answer is None:
                return None
            answers.append(answer)
        return answers

    async def _ask(self, question: str) -> str | None:
        self._tries += 1
        if self._tries > PASSWORD_TRIES or self._answers.gave_up:
            return None
        if self._tries > 1:
            self._answers.forget()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._answers.ask, question)


def options(url: SshUrl, settings: SshSettings, answers: Answers | None) -> dict[str, Any]:
    """Keyword arguments for asyncssh.connect.  Raises UsageError when there is no user name."""
    chosen: dict[str, Any] = {
        "host": url.host,
        "encryption_algs": CIPHERS,
        "compression_algs": None,
        # asyncssh counts the login in, and so a person who types.
        "connect_timeout": ASKING_S if answers else min(ATTEMPT_S, settings.timeout_s),
        "login_timeout": ASKING_S if answers else settings.timeout_s,
        # What a watchdog of ours does not see: a connection on which nothing is asked.
        "keepalive_interval": max(1.0, settings.timeout_s / 3),
        "keepalive_count_max": 2,
        "tcp_keepalive": True,
    }
    if url.port is not None:
        chosen["port"] = url.port
    if url.user:
        chosen["username"] = url.user
    if answers is not None:
        who = f"{url.user or 'you'}@{url.host}"
        chosen["client_factory"] = lambda: Client(answers, who)
        chosen["passphrase"] = answers.passphrase
    chosen |= _files(settings)
    if not url.user and not _has_user():
        raise UsageError(f"{url.host}: who are you there? write ssh://user@{url.host}/…")
    return chosen


def has_known_key(url: SshUrl, settings: SshSettings) -> bool:
    """[blocks] Is there any key of this host among the known ones?"""
    chosen = options(url, settings, None)
    # Which files are known_hosts, and how the host is called there, ssh's configuration may say.
    found = asyncssh.SSHClientConnectionOptions(**chosen | {"client_keys": None})
    known = found.known_hosts
    if known == ():
        path = Path.home() / ".ssh/known_hosts"
        if not path.is_file():
            return False
        known = str(path)
    name = found.host_key_alias or found.host
    return bool(known and asyncssh.match_known_hosts(known, name, "", found.port)[0])


def locked_keys(url: SshUrl, settings: SshSettings) -> list[str]:
    """[blocks] The private keys that a login would use if it had their passphrases."""
    chosen = options(url, settings, None) | {"client_keys": None}
    found = asyncssh.SSHClientConnectionOptions(**chosen)
    configured = cast(list[str] | None, found.config.get("IdentityFile"))
    files = settings.identity or configured or ()
    if not files and _has_home():
        files = [str(path) for path in sorted((Path.home() / ".ssh").glob("id_*"))]
    return [file for file in ([files] if isinstance(files, str) else files) if _is_locked(file)]


def _is_locked(file: str) -> bool:
    try:
        asyncssh.read_private_key(Path(file).expanduser())
    except asyncssh.KeyImportError as exc:
        return str(exc).startswith("Passphrase")  # as asyncssh itself tells it
    except (OSError, ValueError):
        return False
    return False


def _files(settings: SshSettings) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if not _has_home():
        # asyncssh would look in ~/.ssh.  No known host is not "any host": all are unknown.
        chosen = {"config": None, "known_hosts": b"", "client_keys": None}
    if settings.config is not None:
        chosen["config"] = settings.config
    if settings.known_hosts is not None:
        chosen["known_hosts"] = settings.known_hosts
    if isinstance(settings.identity, str):
        chosen["client_keys"] = [settings.identity]
    elif settings.identity:
        chosen["client_keys"] = list(settings.identity)
    return chosen


def _has_home() -> bool:
    try:
        Path.home()
    except (RuntimeError, KeyError):
        return False
    return True


def _has_user() -> bool:
    try:
        getpass.getuser()
    except (OSError, KeyError):
        return False
    return True
