"""Web servers that are away, refuse, or come back."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from imgfs.errors import (
    AccessDenied,
    HostKeyError,
    ImgfsError,
    NotAnImage,
    ProtocolViolation,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
)
from imgfs.sources.objects.source import ObjectSource
from tests.servers.ports import free_port
from tests.servers.web import Liar, Nginx, make_certificate, serving

from .conftest import MIB
from .web import use


@pytest.fixture
def disk(image: Path, tmp_path: Path) -> Path:
    (tmp_path / "www").mkdir(exist_ok=True)
    return Path(shutil.copy2(image, tmp_path / "www/disk.img"))


async def nothing(_: ObjectSource) -> None:
    return


def test_refusals(make_nginx: Callable[..., Nginx]) -> None:
    nginx = make_nginx(more="location /secret.img { deny all; }")
    cases: list[tuple[str, type[ImgfsError], str]] = [
        (nginx.url("missing") + "?token=hidden", SourceNotFound, "no such file"),
        (nginx.url("secret.img"), AccessDenied, "denies access.*IMGFS_HTTP_AUTHORIZATION"),
        (f"http://127.0.0.1:{free_port()}/x", SourceUnreachable, "refused"),
        ("http://no.such.host.invalid/x", SourceUnreachable, "no connection"),
        (nginx.url("x").replace("http", "https"), ProtocolViolation, "does not speak TLS"),
        ("s3://bucket/a/", NotAnImage, "directory"),
    ]
    for url, error, said in cases:
        begun = time.monotonic()
        with pytest.raises(error, match=said) as caught:
            use(url, nothing)
        assert "hidden" not in str(caught.value)
        assert str(caught.value).isprintable()
        assert time.monotonic() - begun < 2  # not tried again


def test_login_over_https_only(
    disk: Path, make_nginx: Callable[..., Nginx], tmp_path: Path
) -> None:
    ca, certificate = make_certificate(tmp_path)
    (tmp_path / "users").write_text("me:{PLAIN}word\n")
    more = f'auth_basic "images"; auth_basic_user_file {tmp_path / "users"};'
    server = make_nginx(more=more, certificate=certificate)

    async def check(source: ObjectSource) -> None:
        assert await source.read(0, MIB) == disk.read_bytes()[:MIB]

    trusted = {"ca_file": str(ca)}
    right = "Basic bWU6d29yZA=="
    use(server.url("disk.img"), check, authorization=right, **trusted)
    with pytest.raises(AccessDenied, match=r"wants a login.*can be given"):
        use(server.url("disk.img"), check, **trusted)
    with pytest.raises(AccessDenied, match=r"wants a login.*with what") as caught:
        use(server.url("disk.img"), check, authorization="Basic bWU6", **trusted)
    assert "bWU6" not in str(caught.value)
    plain = make_nginx(more=more)
    with pytest.raises(AccessDenied, match="over https only"):
        use(plain.url("disk.img"), check, authorization=right)


def test_login_is_not_given_to_another_host(
    disk: Path, make_nginx: Callable[..., Nginx], tmp_path: Path
) -> None:
    ca, certificate = make_certificate(tmp_path)
    log = "if ($http_authorization) { return 418; }"
    other = make_nginx(more=log, certificate=certificate)
    target = other.url("disk.img", "localhost")
    server = make_nginx(more=f"return 302 {target};", certificate=certificate)
    use(server.url("x"), nothing, authorization="Bearer x", ca_file=str(ca))
    with pytest.raises(ImgfsError, match="418"):
        use(target, nothing, authorization="Bearer x", ca_file=str(ca))


def test_certificates(make_nginx: Callable[..., Nginx], disk: Path, tmp_path: Path) -> None:
    ca, certificate = make_certificate(tmp_path)
    server = make_nginx(certificate=certificate)
    with pytest.raises(HostKeyError, match=r"not trusted.*SSL_CERT_FILE"):
        use(server.url("disk.img"), nothing)
    use(server.url("disk.img"), nothing, ca_file=str(ca))
    ca, certificate = make_certificate(tmp_path, "DNS:other.invalid")
    other = make_nginx(certificate=certificate)
    with pytest.raises(HostKeyError, match=r"not trusted.*name"):
        use(other.url("disk.img"), nothing, ca_file=str(ca))


def test_no_way_from_https_to_http(
    make_nginx: Callable[..., Nginx], disk: Path, tmp_path: Path
) -> None:
    ca, certificate = make_certificate(tmp_path)
    plain = make_nginx()
    server = make_nginx(more=f"return 302 {plain.url('disk.img')};", certificate=certificate)
    with pytest.raises(ProtocolViolation, match="https"):
        use(server.url("x"), nothing, ca_file=str(ca))
    assert not plain.requests()
    use(server.url("x"), nothing, ca_file=str(ca), allow_http=True)


def test_redirects_in_circles(make_nginx: Callable[..., Nginx]) -> None:
    server = make_nginx(more="return 302 $uri;")
    with pytest.raises(ProtocolViolation, match="circles"):
        use(server.url("x"), nothing)


def test_killed_and_back(disk: Path, nginx: Nginx) -> None:
    data = disk.read_bytes()

    async def check(source: ObjectSource) -> None:
        await source.read(0, 10)
        nginx.stop()
        begun = time.monotonic()
        with pytest.raises(SourceUnreachable, match="refused"):
            await source.read(0, 10)
        assert 0.9 < time.monotonic() - begun < 2.5
        with pytest.raises(SourceUnreachable):
            await source.check_identity()
        nginx.start()
        assert await source.read(MIB, MIB) == data[MIB : 2 * MIB]
        await source.check_identity()

    use(nginx.url("disk.img"), check, timeout_s=1)


def test_restarted_while_it_is_read(disk: Path, nginx: Nginx) -> None:
    """Nobody who reads hears of it."""
    data = disk.read_bytes()

    async def check(source: ObjectSource) -> None:
        async def read() -> None:
            for _ in range(20):
                assert await source.read(0, len(data)) == data

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(read)
            for _ in range(3):
                await trio.sleep(0.1)
                nginx.stop()
                await trio.sleep(0.2)
                nginx.start()

    use(nginx.url("disk.img"), check, timeout_s=10)


def test_frozen_server_is_an_error_in_time(disk: Path, nginx: Nginx) -> None:
    async def check(source: ObjectSource) -> None:
        nginx.send(signal.SIGSTOP)
        try:
            for ask in (lambda: source.read(0, 4 * MIB), source.check_identity):
                begun = time.monotonic()
                with pytest.raises(SourceTimeout, match="does not answer"):
                    await ask()
                assert 0.9 < time.monotonic() - begun < 2
        finally:
            nginx.send(signal.SIGCONT)
        assert len(await source.read(0, 4 * MIB)) == 4 * MIB

    use(nginx.url("disk.img"), check, timeout_s=1)


def test_nobody_answers_at_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        begun = time.monotonic()
        with pytest.raises(SourceTimeout, match="does not answer"):
            use(f"http://127.0.0.1:{listener.getsockname()[1]}/x", nothing, timeout_s=1)
        assert 0.9 < time.monotonic() - begun < 2


class Failing(Liar):
    """Fails so many requests with a status first."""

    failures = 0
    status = 503
    words = b"it failed"

    def do_GET(self) -> None:
        if not self.fails():
            super().do_GET()

    def do_HEAD(self) -> None:
        if not self.fails():
            super().do_HEAD()

    def fails(self) -> bool:
        if type(self).failures <= 0:
            return False
        type(self).failures -= 1
        self.refuse(self.status, self.words)
        return True


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_failures_that_pass(status: int) -> None:
    with serving(Failing) as (url, server):
        server.status = status  # type: ignore[attr-defined]

        async def check(source: ObjectSource) -> None:
            server.failures = 3  # type: ignore[attr-defined]
            assert await source.read(7, 5) == Liar.data[7:12]

        server.failures = 2  # type: ignore[attr-defined]
        use(url, check)


def test_failures_that_stay() -> None:
    with serving(Failing) as (url, server):

        async def check(source: ObjectSource) -> None:
            server.failures = 10**6  # type: ignore[attr-defined]
            server.status = 502  # type: ignore[attr-defined]
            begun = time.monotonic()
            with pytest.raises(SourceUnreachable, match=r"fails \(502\)"):
                await source.read(0, 5)
            assert 0.9 < time.monotonic() - begun < 2.5
            server.status = 501  # type: ignore[attr-defined]
            begun = time.monotonic()
            with pytest.raises(ImgfsError, match=r"refuses \(501\)"):
                await source.read(0, 5)
            assert time.monotonic() - begun < 0.5

        use(url, check, timeout_s=1)


def test_refusal_in_another_alphabet() -> None:
    """Error pages in Latin-1 are usual."""
    with serving(Failing) as (url, server):
        server.words = b"<p>\xfcberlastet: status code: 404</p>"  # type: ignore[attr-defined]
        for status, error in ((403, AccessDenied), (404, SourceNotFound), (503, SourceUnreachable)):
            server.status = status  # type: ignore[attr-defined]
            server.failures = 10**6  # type: ignore[attr-defined]
            with pytest.raises(error):
                use(url, nothing, timeout_s=1)
