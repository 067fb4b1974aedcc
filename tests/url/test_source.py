"""What a person may write as a SOURCE."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.errors import UsageError
from imgfs.url.source import ObjectUrl, SshUrl, parse


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ssh://kool/mnt/a.img", SshUrl(None, "kool", None, b"/mnt/a.img")),
        ("ssh://me@kool:2222/a", SshUrl("me", "kool", 2222, b"/a")),
        ("ssh://[::1]:22/a", SshUrl(None, "::1", 22, b"/a")),
        ("ssh://[fe80::1%eth0]/a", SshUrl(None, "fe80::1%eth0", None, b"/a")),
        ("ssh://KooL/a", SshUrl(None, "KooL", None, b"/a")),
        ("SSH://kool/a", SshUrl(None, "kool", None, b"/a")),
        ("ssh://d%40m@kool/a", SshUrl("d@m", "kool", None, b"/a")),
        ("ssh://kool/~/x/y", SshUrl(None, "kool", None, b"x/y")),
        ("ssh://kool/%7Ename", SshUrl(None, "kool", None, b"/~name")),
        ("ssh://kool/a%20b%ff?c#d", SshUrl(None, "kool", None, b"/a b\xff?c#d")),
        ("ssh://kool/a\nb\tc", SshUrl(None, "kool", None, b"/a\nb\tc")),
        ("ssh://kool//a//b", SshUrl(None, "kool", None, b"//a//b")),
        ("ssh://kool/100%", SshUrl(None, "kool", None, b"/100%")),
    ],
)
def test_ssh_url(text: str, wanted: SshUrl) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize("text", ["disk.img", "/a/b c", "./a:b", "a/b:c", "C", "-", "x\udcff"])
def test_path_is_itself(text: str) -> None:
    assert parse(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ssh://me:secret@kool/a", "password"),
        ("ssh:///a", "no host"),
        ("ssh://kool", "no path"),
        ("ssh://kool/", "no path"),
        ("ssh://kool/~/", "no path"),
        ("ssh://kool/~you/x", "%7E"),
        ("ssh://-oProxyCommand=x/a", "no host"),
        ("ssh://kool:0/a", "port"),
        ("ssh://kool:65536/a", "port"),
        ("ssh://kool:x/a", "port"),
        ("ssh://[::1/a", "not a host"),
        ("ssh://kool/a%00b", "can have that name"),
        ("https://me:secret@kool/a", "IMGFS_HTTP_AUTHORIZATION"),
        ("https://kool\\@secret/a", "names no file"),
        ("https:///a", "not a host"),
        ("https://kool%41/a", "not a host"),
        ("https://kool\\a", "names no file"),
        ("https://kool:0/a", "port"),
        ("https://kool", "names no file"),
        ("https://kool/?secret", "names no file"),
        ("https://kool/a/", "names no file"),
        ("https://kool/a/%2e%2E", "names no file"),
        ("https://kool/a%00b?secret", "names no file"),
        ("https://kool/a#secret", "%23"),
        ("https://kool/a?secret#b", "%23"),
        ("s3://key:secret@bucket/x", "AWS_SECRET_ACCESS_KEY"),
        ("s3:///x", "not a bucket"),
        ("s3://b/x", "not a bucket"),
        ("s3://bucket/a//b", "not supported"),
        ("s3://bucket/a/../b", "not supported"),
        ("s3://bucket/%ff", "UTF-8"),
        ("ftp://kool/x", "not supported"),
        ("kool:x.img", "ssh://kool/~/x.img"),
        ("me@kool:/x.img", "ssh://me@kool/x.img"),
        ("", "needs a name"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "address", "shown", "name"),
    [
        ("http://kool/a.img", "http://kool/a.img", None, "a.img"),
        ("HTTPS://Kool:8443/a/b%20c", "https://Kool:8443/a/b%20c", None, "b c"),
        ("http://[::1]:80/x", "http://[::1]:80/x", None, "x"),
        ("http://kool/%7Ea/%2541", "http://kool/%7Ea/%2541", None, "%41"),
        ("http://kool/ä b\n\\", "http://kool/%C3%A4%20b%0A%5C", None, "ä b\n\\"),
        ("http://kool/a%2Fb.img", "http://kool/a%2Fb.img", None, "b.img"),
        ("http://kool/%ff", "http://kool/%ff", None, "\udcff"),
        ("http://kool/a?t=1%20&u=/x y", "http://kool/a?t=1%20&u=/x%20y", "http://kool/a?...", "a"),
        ("http://kool/a?", "http://kool/a?", "http://kool/a?...", "a"),
        ("http://kool/a?u=me@there", "http://kool/a?u=me@there", "http://kool/a?...", "a"),
    ],
)
def test_http_url(text: str, address: str, shown: str | None, name: str) -> None:
    url = parse(text)
    assert isinstance(url, ObjectUrl)
    assert (url.address, url.text, url.basename) == (address, shown or address, name)
    assert url.text.isprintable()
    if shown is None:
        assert parse(url.text) == url


@pytest.mark.parametrize(
    ("text", "bucket", "key", "name"),
    [
        ("s3://my-bucket/a/b.img", "my-bucket", "a/b.img", "b.img"),
        ("S3://my.bucket/a%20b?c#d", "my.bucket", "a b?c#d", "a b?c#d"),
        ("s3://bucket/%C3%A9%2541", "bucket", "é%41", "é%41"),
        ("s3://bucket/a/", "bucket", "a/", ""),
        ("s3://bucket/", "bucket", "", ""),
        ("s3://bucket", "bucket", "", ""),
    ],
)
def test_s3_url(text: str, bucket: str, key: str, name: str) -> None:
    url = parse(text)
    assert isinstance(url, ObjectUrl)
    assert (url.host, url.key, url.basename) == (bucket, key, name)
    assert url.text.isprintable()
    assert parse(url.text) == url


def test_file_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host:disk").touch()
    assert parse("host:disk") == "host:disk"


def names() -> st.SearchStrategy[bytes]:
    return st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


@given(names(), st.booleans())
def test_text_is_one_line_and_parses_back(name: bytes, home: bool) -> None:
    path = name.lstrip(b"/") if home else b"/" + name
    if path in (b"", b"/"):
        return
    url = SshUrl("u@x", "::1", 22, path)
    assert url.text.isprintable()
    assert parse(url.text) == url
    assert os.fsencode(url.basename) == path.rstrip(b"/").rpartition(b"/")[2]
    assert url.is_directory == path.endswith(b"/")
