"""The options of a mount, parsed from `-o` and checked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from imgfs.errors import UsageError
from imgfs.formats.served import SERVED
from imgfs.sources.nbd.settings import NbdSettings
from imgfs.sources.objects.settings import ObjectSettings, from_environment
from imgfs.sources.ssh.settings import HELPERS, Prompt, SshSettings
from imgfs.units import parse_size

# mount(8) adds these unasked, or means something outside of imgfs by them.
_IGNORED = frozenset({"rw", "dev", "nodev", "suid", "nosuid", "_netdev", "nofail"})
_IGNORED |= {"auto", "noauto", "user", "users", "nouser", "owner", "group", "defaults", "silent"}
# All times are the source's, and shown as they are.
_IGNORED |= {"atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime"}
_IGNORED |= {"strictatime", "nostrictatime", "lazytime", "nolazytime"}
# Mandatory locks are no more, and what iversion counts has no use outside of the kernel.
_IGNORED |= {"iversion", "noiversion", "mand", "nomand", "loud"}
#: What the kernel does by itself, and which of those the option is, or takes back.
_KERNEL = {"noexec": "noexec", "sync": "sync", "dirsync": "dirsync"}
_TAKES_BACK = {"exec": "noexec", "async": "sync"}
FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhd", "vpc", "vhdx", *SERVED)
_FLAGS = {"ro": "read_only", "allow_other": "allow_other", "lazy": "lazy", "hard": "hard"}
# What people try for S3 and http; everybody can see a command line.
_SECRETS = re.compile(r".*(access_key|secret|token|passw|authorization|credential).*", re.I)


@dataclass(frozen=True, slots=True)
class Options:
    """What can be said with `-o`."""

    read_only: bool = False
    allow_other: bool = False
    extents: bool = True
    kernel: tuple[str, ...] = ()  #: noexec, sync, dirsync: the kernel sees to those
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None  #: all may do what the owner may, but for these bits
    threads: int = 0  #: request threads; 0 chooses
    cache_size: int | None = None  #: bytes; None: 10 GiB or a tenth of the free disk
    timeout: int = 30  #: seconds until an absent server is an error
    known_hosts: str | None = None
    key: str | None = None  #: private key file of ssh
    config: str | None = None  #: ssh's
    helpers: tuple[str, ...] = HELPERS
    lazy: bool = False  #: connect at first use
    hard: bool = False  #: wait for an absent server for ever
    #: fetch whole images, so many bytes a second (0: as fast as it goes); None: only what is read
    prefetch: int | None = None
    #: of a source that has none: it is the same image for as long as this is the same text
    identity: str | None = None
    format: str | None = None  #: of the image; None: what its content says
    #: where the file is that the image names: a source, or `any` to follow the name anywhere
    backing: str | None = field(default=None, repr=False)
    snapshot: str | None = None  #: id or name of one inside of the image: its disk is shown
    luks_key: str | None = None  #: a file that holds a passphrase and nothing else
    write: bool = False  #: write=through: what is written goes to the source
    among_others: bool = False  #: other processes write what is written, too, until it is pinned
    #: of http and S3, where a file says more than the environment
    object_settings: ObjectSettings | None = field(default=None, repr=False)
    #: how to ask the person, while the mount is not ready
    prompt: Prompt | None = field(default=None, compare=False, repr=False)

    @property
    def write_through(self) -> bool:
        """Are sources opened for writing?"""
        return self.write and not self.read_only

    @property
    def tells_of_disk(self) -> bool:
        """Has a person said what the image is, or which file it stands on?"""
        return self.format is not None or self.backing not in (None, "any")

    def ssh(self) -> SshSettings:
        """The part that is about ssh."""
        return SshSettings(
            timeout_s=self.timeout,
            known_hosts=self.known_hosts,
            identity=self.key,
            config=self.config,
            extents=self.extents,
            helpers=self.helpers,
            prompt=self.prompt,
        )

    def objects(self) -> ObjectSettings:
        """The part that is about http and S3; the rest of it is in the environment.

        Raises UsageError when that contradicts itself.
        """
        return self.object_settings or from_environment(os.environ, timeout_s=self.timeout)

    def nbd(self) -> NbdSettings:
        """The part that is about NBD."""
        return NbdSettings(
            timeout_s=self.timeout,
            extents=self.extents,
            pin=self.identity,
            write=self.write_through,
        )


#: What is wrong where the name of an option is known, and what follows it cannot be meant.
_VALUES = {
    "extents": "say extents=on or extents=off",
    "write": "say write=through",
    **dict.fromkeys((*_FLAGS, "soft", *_KERNEL, *_TAKES_BACK, *_IGNORED), "takes no value"),
    **dict.fromkeys(
        ("known_hosts", "key", "config", "luks_key", "format", "identity", "backing", "snapshot"),
        "has no value",
    ),
}


def _number(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise UsageError(f"-o {name}={value}: not a number of 0 or more")
    return int(value)


def _size(name: str, value: str) -> int:
    try:
        return parse_size(value)
    except UsageError as exc:
        raise UsageError(f"-o {name}={exc}") from None


def _umask(value: str) -> int:
    if not re.fullmatch("[0-7]{1,4}", value) or int(value, 8) > 0o777:
        raise UsageError(f"-o umask={value}: not an octal number up to 777")
    return int(value, 8)


def format_name(value: str) -> str:
    """As qemu calls it.  Raises UsageError for one that cannot be meant."""
    name = {"vhd": "vpc"}.get(value, value)
    if name not in FORMATS:
        raise UsageError(f"format {value}: name one of {', '.join(FORMATS)}")
    return name


def _helpers(value: str) -> tuple[str, ...]:
    # A comma would end the option.
    names = tuple(value.split("+"))
    if not set(names) <= set(HELPERS):
        raise UsageError(f"-o helpers={value}: name some of {'+'.join(HELPERS)}, with + between")
    return names


def parse_options(texts: tuple[str, ...]) -> Options:
    """Options from `a,b=c` texts.  Raises UsageError naming the one that is wrong."""
    values: dict[str, object] = {}
    kernel: dict[str, None] = {}
    for item in (part for text in texts for part in text.split(",") if part):
        name, _, value = item.partition("=")
        if item in _IGNORED or name.startswith("x-") or name == "comment":
            continue
        if item in _KERNEL:
            kernel[item] = None
            continue
        if item in _TAKES_BACK:
            kernel.pop(_TAKES_BACK[item], None)
            continue
        if item == "soft":
            values["hard"] = False
            continue
        if item in _FLAGS:
            values[_FLAGS[item]] = True
        elif name == "extents" and value in ("on", "off"):
            values["extents"] = value == "on"
        elif name == "cache_size":
            values[name] = _size(name, value)
        elif name == "prefetch":
            values[name] = _size(name, value) if value else 0
            if value and not values[name]:
                raise UsageError(f"-o {item}: nothing would ever come; prefetch alone is any rate")
        elif name == "umask":
            values[name] = _umask(value)
        elif name == "helpers":
            values[name] = _helpers(value)
        elif name in ("known_hosts", "key", "config", "luks_key") and value:
            values[name] = str(Path(value).absolute())
        elif name == "format" and value:
            values[name] = format_name(value)
        elif name in ("identity", "backing", "snapshot") and value:
            values[name] = value
        elif item == "write=through":
            values[name] = True
        elif name in ("uid", "gid", "threads", "timeout"):
            values[name] = _number(name, value)
        elif _SECRETS.fullmatch(name):
            raise UsageError(
                f"-o {name}: a secret on a command line is seen by everybody; put it into the "
                "environment (AWS_SECRET_ACCESS_KEY, IMGFS_HTTP_AUTHORIZATION and others)"
            )
        elif item == "remount":
            raise UsageError("-o remount: cannot be done; unmount it, and mount it anew")
        else:
            raise UsageError(f"-o {item}: {_VALUES.get(name, 'unknown option')}")
    return Options(**values, kernel=tuple(kernel))  # type: ignore[arg-type]


def owner(options: Options) -> tuple[int, int]:
    """The uid and gid that files show."""
    uid = os.getuid() if options.uid is None else options.uid
    gid = os.getgid() if options.gid is None else options.gid
    return uid, gid
