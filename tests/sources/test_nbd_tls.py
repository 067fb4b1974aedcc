"""NBD over TLS, with certificates and with pre-shared keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgfs.errors import AccessDenied, UnsupportedFeature
from tests.servers.nbd import Nbdkit, QemuNbd, make_certificates, make_psk

from .conftest import run
from .nbd import opened, refused

Maker = Callable[..., Any]


def reads(text: str, image: Path) -> None:
    async def main() -> None:
        async with opened(text) as source:
            assert bytes(await source.read(0, image.stat().st_size)) == image.read_bytes()
            assert (await source.extents(0, source.size)).stored_bytes() < source.size

    run(main)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    return make_certificates(tmp_path / "pki", "IP:127.0.0.1", "DNS:localhost")


def test_certificates(servers: Maker, image: Path, certificates: Path) -> None:
    words = ["--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer"]
    server = servers(Nbdkit, *words, "file", image, tcp=True)
    good = server.url(tls=True, tls_certificates=certificates).replace("127.0.0.1", "localhost")
    reads(good, image)
    reads(good + "&tls-type=x509&tls-verify-peer=1", image)


def test_certificates_of_qemu(servers: Maker, image: Path, certificates: Path) -> None:
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={certificates},verify-peer=no"
    words = ["--object", creds, "--tls-creds", "t", "-f", "raw", image]
    server = servers(QemuNbd, *words, tcp=True)
    url = server.url(tls=True, tls_certificates=certificates).replace("127.0.0.1", "localhost")

    async def main() -> None:
        async with opened(url) as source:
            found = bytes(await source.read(0, image.stat().st_size))
            assert found == image.read_bytes()

    run(main)


def test_certificate_of_nobody_we_know(
    servers: Maker, image: Path, certificates: Path, tmp_path: Path
) -> None:
    server = servers(
        Nbdkit, "--tls=require", f"--tls-certificates={certificates}", "file", image, tcp=True
    )
    other = make_certificates(tmp_path / "other", "DNS:localhost")
    url = server.url(tls=True, tls_certificates=other).replace("127.0.0.1", "localhost")
    assert "TLS failed" in refused(url, AccessDenied)
    reads(url + "&tls-verify-peer=0", image)


def test_certificate_of_another_name(servers: Maker, image: Path, tmp_path: Path) -> None:
    pki = make_certificates(tmp_path / "pki", "DNS:kool")
    server = servers(Nbdkit, "--tls=require", f"--tls-certificates={pki}", "file", image, tcp=True)
    url = server.url(tls=True, tls_certificates=pki).replace("127.0.0.1", "localhost")
    assert "TLS failed" in refused(url, AccessDenied)
    import nbd

    named = url + "&tls-hostname=kool"
    if hasattr(nbd.NBD, "set_tls_hostname"):
        reads(named, image)
    else:
        assert "libnbd 1.22" in refused(named, UnsupportedFeature)


def test_pre_shared_key(servers: Maker, image: Path, tmp_path: Path) -> None:
    psk = make_psk(tmp_path, "me")
    server = servers(Nbdkit, "--tls=require", f"--tls-psk={psk}", "file", image)
    reads(server.url(tls=True, user="me", tls_psk_file=psk), image)
    stranger = make_psk(tmp_path, "you")
    refused(server.url(tls=True, user="you", tls_psk_file=stranger), AccessDenied)
    said = refused(server.url(tls=True, user="you", tls_psk_file=psk), AccessDenied)
    key = psk.read_text().strip().partition(":")[2]
    assert key not in said
    refused(server.url(tls=True, user="me", tls_psk_file=tmp_path / "none"), AccessDenied)


def test_tls_is_required_or_is_missing(servers: Maker, image: Path, tmp_path: Path) -> None:
    psk = make_psk(tmp_path, "me")
    strict = servers(Nbdkit, "--tls=require", f"--tls-psk={psk}", "file", image)
    assert "nbds://" in refused(strict.url(), AccessDenied)
    plain = servers(Nbdkit, "file", image)
    assert "no TLS" in refused(plain.url(tls=True, user="me", tls_psk_file=psk), AccessDenied)
