"""NBD's URLs, and commands that serve NBD."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.errors import UsageError
from imgfs.url.nbd import MOST_NAME, NbdCommand, NbdUrl
from imgfs.url.source import parse


def url(export: bytes = b"", transport: str = "tcp", **more: Any) -> NbdUrl:
    base: dict[str, Any] = {"tls": False, "user": None, "host": "", "port": None}
    return NbdUrl(transport=transport, export=export, **(base | more))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nbd://kool", url(host="kool")),
        ("nbd://kool/", url(host="kool")),
        ("NBD://kool/disk", url(b"disk", host="kool")),
        ("nbd://kool:10810/a/b", url(b"a/b", host="kool", port=10810)),
        ("nbd://kool//disk", url(b"/disk", host="kool")),
        ("nbd://kool/hello%20world%3F%23%ff", url(b"hello world?#\xff", host="kool")),
        ("nbd://[::1]:99/x", url(b"x", host="::1", port=99)),
        ("nbds://me@kool/x", url(b"x", host="kool", tls=True, user="me")),
        ("nbd+unix:///x?socket=/run/s%20s", url(b"x", "unix", socket=b"/run/s s")),
        ("nbd+unix://?socket=/s", url(b"", "unix", socket=b"/s")),
        ("nbd+vsock://2:1234/x", url(b"x", "vsock", host="2", port=1234)),
        ("nbd+vsock:///x", url(b"x", "vsock")),
        ("nbds+vsock://3/", url(b"", "vsock", host="3", tls=True)),
        (
            "nbds+unix://me@/x?socket=/s&tls-psk-file=/k&tls-type=psk",
            url(b"x", "unix", tls=True, user="me", socket=b"/s", psk_file="/k"),
        ),
        (
            "nbds://kool/x?tls-certificates=/c&tls-hostname=h&tls-verify-peer=0",
            url(
                b"x",
                host="kool",
                tls=True,
                certificates="/c",
                tls_hostname="h",
                verify_peer=False,
            ),
        ),
    ],
)
def test_forms(text: str, wanted: NbdUrl) -> None:
    assert parse(text) == wanted
    assert parse(wanted.text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nbd://me:secret@kool/x", "password"),
        ("nbds://a:secret@b@kool/x", "password"),
        ("nbd:///x", "no host"),
        ("nbd://a b/x", "no host"),
        ("nbd://kool:0/x", "port"),
        ("nbd://kool:70000/x", "port"),
        ("nbd://[::1/x", "not a host"),
        ("nbd://kool/x#y", "%23"),
        ("nbd://kool/a%00b", "%00"),
        ("nbd://kool/" + "x" * (MOST_NAME + 1), "4096"),
        ("nbd://kool/x?socket=/s", "nbd+unix:///"),
        ("nbd://kool/x?sokket=/s", "unknown parameter"),
        ("nbd://me@kool/x", "needs TLS"),
        ("nbd://kool/x?tls-certificates=/c", "nbds://"),
        ("nbd+unix:///x?socket=/s&tls-psk-file=/c", "nbds+unix://"),
        ("nbd+unix:///x", "no socket"),
        ("nbd+unix://kool/x?socket=/s", "a host and a socket"),
        ("nbd+unix:///x?socket=", "no value"),
        ("nbd+unix:///x?socket=/a&socket=/b", "twice"),
        ("nbd+unix:///x?socket=%00abstract", "abstract"),
        ("nbd+unix:///x?socket=/" + "x" * 107, "107"),
        ("nbd+vsock://kool/x", "CID"),
        ("nbd+vsock://4294967296/x", "CID"),
        ("nbd+vsock://2:4294967296/x", "port"),
        ("nbds://kool/x?tls-type=psk", "tls-psk-file="),
        ("nbds://kool/x?tls-type=anon", "x509"),
        ("nbds://kool/x?tls-type=x509&tls-psk-file=/p", "exclude"),
        ("nbds://kool/x?tls-verify-peer=maybe", "0 or 1"),
        ("nbd+command:", "no command"),
        ("nbd+command:''", "no command"),
        ("nbd+command:nbdkit 'file", "quotation"),
        ("nbd+ssh://kool/x", "not supported"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("export", "name"),
    [
        (b"", "disk"),
        (b"/", "disk"),
        (b"a", "a"),
        (b"a/b.img", "b.img"),
        (b"a/b/", "b"),
        (b"..", "disk"),
        (b"x/.", "disk"),
        (b"\xff", "\udcff"),
    ],
)
def test_basename(export: bytes, name: str) -> None:
    assert url(export, host="kool").basename == name


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = parse("nbds+unix:///?socket=s&tls-psk-file=k")
    assert isinstance(found, NbdUrl)
    assert (found.socket, found.psk_file) == (bytes(tmp_path / "s"), str(tmp_path / "k"))


names = st.binary(max_size=60).filter(lambda name: b"\0" not in name)


@given(names, names.filter(bool))
def test_text_is_one_line_and_parses_back(export: bytes, path: bytes) -> None:
    found = url(export, "unix", tls=True, user="a@b:c/d", socket=b"/" + path, psk_file="/\udcff")
    if found.socket is not None and Path(os.fsdecode(found.socket)).is_absolute():
        assert found.text.isprintable()
        assert parse(found.text) == found
        assert found.uri.isascii()


def test_command() -> None:
    found = parse("nbd+command:nbdkit file 'my disk.img' password=secret")
    assert found == NbdCommand(("nbdkit", "file", "my disk.img", "password=secret"))
    assert parse(found.text) == found
    assert (found.basename, found.name) == ("disk", "nbd+command:nbdkit")
