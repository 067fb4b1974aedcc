"""The TOML file of many images: what it means, and what its mistakes are called."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.config.file import (
    PREFETCH_FREE,
    PREFETCH_OFF,
    READAHEAD_FREE,
    READAHEAD_OFF,
    ConfigFile,
    HttpSettings,
    ImageSettings,
    S3Settings,
    load,
)
from imgfs.config.options import Options
from imgfs.errors import UsageError
from imgfs.sources.objects.settings import from_environment

Loader = Callable[[str], ConfigFile]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Loads a text, by a relative name; images are relative to the file all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf/images.toml"
    path.touch(0o600)

    def load_text(text: str) -> ConfigFile:
        path.write_text(text)
        return load("conf/images.toml")

    return load_text


FULL = """
[defaults]
cache_size = "2G"
timeout = 10
prefetch = "20M"
extents = "off"
known_hosts = "known"
helpers = ["perl", "python3"]

[images.fedora-33]
source = "ssh://kool/mnt/scratch/fedora-33.img"
format = "qcow2"
backing = "base.img"
cache_size = 4096
readahead = "off"
prefetch = false
extents = true
timeout = 5
hard = true
identity = "2020-11-20"
key = "/keys/id"
config = "~/.ssh/other"
[images.fedora-33.s3]
endpoint = "http://localhost:9000"
region = "eu"
access_key = "AK"
secret_key = "SK"
session_token = "ST"
ca_file = "ca.pem"
path_style = true
allow_http = true

[images."centos.stream"]
command = ["nbdkit", "memory", "1G"]
readahead = "64M"
backing = "any"

[s3]
region = "us"

[http]
authorization = "Bearer T"
ca_file = "/ca.pem"
allow_http = false
"""


def test_everything(read: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = read(FULL)
    conf = str(tmp_path / "conf")
    assert (found.path, found.directory) == (f"{conf}/images.toml", conf)
    assert found.warnings == ()
    http = HttpSettings(authorization="Bearer T", ca_file="/ca.pem", allow_http=False)
    assert list(found.images.items()) == [
        (
            "fedora-33",
            ImageSettings(
                source="ssh://kool/mnt/scratch/fedora-33.img",
                format="qcow2",
                backing=f"{conf}/base.img",
                cache_size=4096,
                readahead=READAHEAD_OFF,
                prefetch=PREFETCH_OFF,
                extents=True,
                timeout=5,
                hard=True,
                identity="2020-11-20",
                known_hosts=f"{conf}/known",
                key="/keys/id",
                config="/home/me/.ssh/other",
                helpers=("perl", "python3"),
                s3=S3Settings(
                    "http://localhost:9000", "eu", "AK", "SK", "ST", f"{conf}/ca.pem", True, True
                ),
                http=http,
            ),
        ),
        (
            "centos.stream",
            ImageSettings(
                command=("nbdkit", "memory", "1G"),
                backing="any",
                cache_size=2 << 30,
                readahead=64 << 20,
                prefetch=20 << 20,
                extents=False,
                timeout=10,
                known_hosts=f"{conf}/known",
                helpers=("perl", "python3"),
                s3=S3Settings(region="us"),
                http=http,
            ),
        ),
    ]


def test_what_is_not_said_is_none_and_leaves_options_alone(read: Loader) -> None:
    found = read('images.a.source = "/x"').images["a"]
    assert found == ImageSettings(source="/x")
    options = Options(timeout=7, extents=False, known_hosts="/known", key="/id", threads=3)
    assert found.over(options) == options


def test_what_is_said_is_over_options(read: Loader) -> None:
    found = read('images.a = {source="/x", timeout=9, extents=false, key="/k", helpers=[]}')
    options = Options(timeout=7, known_hosts="/known", key="/id", uid=5)
    expected = Options(timeout=9, extents=False, known_hosts="/known", key="/k", uid=5, helpers=())
    assert found.images["a"].over(options) == expected


def test_s3_settings(read: Loader) -> None:
    text = "images.a.source = 's3://bucket/disk.img'\n"
    environment = {
        "AWS_ACCESS_KEY_ID": "their",
        "AWS_SECRET_ACCESS_KEY": "theirs",
        "AWS_SESSION_TOKEN": "their session",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/token",
        "AWS_ENDPOINT_URL": "http://theirs",
        "AWS_REGION": "their-region",
        "IMGFS_HTTP_AUTHORIZATION": "theirs",
    }
    theirs = from_environment(environment, timeout_s=7)
    http = "http = {authorization = 'ours', ca_file = '/ours.pem'}\n"
    assert read(text + http).images["a"].objects(environment, 7) == theirs
    found = read(f"{text}s3.endpoint = 'http://ours'\ns3.allow_http = true").images["a"]
    changed = replace(theirs, endpoint="http://ours", allow_http=True)
    assert found.objects(environment, 7) == changed
    keys = f"{text}[s3]\naccess_key = 'a'\nsecret_key = 'b'"
    own = replace(
        theirs, access_key_id="a", secret_access_key="b", session_token=None, fetched=False
    )
    assert read(keys).images["a"].objects(environment, 7) == own
    del environment["AWS_SECRET_ACCESS_KEY"]  # what is left is of no use, and not needed
    found = read(f"{keys}\nsession_token = 'c'\nregion = 'ours'").images["a"]
    assert found.objects(environment, 7) == replace(own, session_token="c", region="ours")
    with pytest.raises(UsageError, match="AWS_SECRET_ACCESS_KEY is not"):
        read(text).images["a"].objects(environment, 7)


def test_http_settings(read: Loader) -> None:
    text = "images.a.source = 'https://host/disk.img'\n"
    environment = {"IMGFS_HTTP_AUTHORIZATION": "theirs", "AWS_CA_BUNDLE": "/theirs.pem"}
    theirs = from_environment(environment, timeout_s=7)
    s3 = "s3 = {region = 'x', ca_file = '/no.pem'}\n"
    assert read(text + s3).images["a"].objects(environment, 7) == theirs
    found = read(f"{text}http = {{authorization = 'ours', allow_http = true, ca_file = '/x'}}")
    changed = replace(theirs, authorization="ours", allow_http=True, ca_file="/x")
    assert found.images["a"].objects(environment, 7) == changed


def test_authorization_is_for_one_server(read: Loader) -> None:
    text = """
        [images.a]
        source = "https://one.example/a"
        backing = "HTTPS://ONE.example/b"
        [images.b]
        source = "http://three.example/b"   # it is not sent there at all
        [images.c]
        source = "ssh://three.example/b"
        [http]
        authorization = "x"
    """
    assert read(text).images["a"].http.authorization == "x"
    more = '[images.d]\nsource = "https://one.example:444/x"'
    said = (
        "conf/images.toml:10: [http] authorization: would be sent to one.example and "
        "one.example:444; put it into [images.NAME.http]"
    )
    with pytest.raises(UsageError) as found:
        read(f"{text}{more}")
    assert str(found.value) == said
    with pytest.raises(UsageError, match=r"to one\.example and two\.example;"):
        read(text.replace("HTTPS://ONE", "https://two"))
    own = read(f"{text}{more}\nhttp.authorization = 'y'").images
    assert [own[n].http.authorization for n in "abd"] == ["x", "x", "y"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('"off"', READAHEAD_OFF),
        ("false", READAHEAD_OFF),
        ("0", 0),
        ('"on"', READAHEAD_FREE),
        ("true", READAHEAD_FREE),
        ('"1.5M"', 3 << 19),
        ("1", 1),
    ],
)
def test_readahead(read: Loader, written: str, value: int) -> None:
    assert read(f'images.a = {{source="/x", readahead={written}}}').images["a"].readahead == value


@pytest.mark.parametrize(
    ("written", "value", "option"),
    [
        ('"off"', PREFETCH_OFF, None),
        ("false", PREFETCH_OFF, None),
        ('"on"', PREFETCH_FREE, 0),
        ("true", PREFETCH_FREE, 0),
        ('"1.5M"', 3 << 19, 3 << 19),
        ("1", 1, 1),
    ],
)
def test_prefetch(read: Loader, written: str, value: int, option: int | None) -> None:
    found = read(f'images.a = {{source="/x", prefetch={written}}}').images["a"]
    assert found.prefetch == value
    for of_mount in (None, 0, 20):
        assert found.over(Options(prefetch=of_mount)).prefetch == option


def test_sources(read: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    conf = tmp_path / "conf"
    (conf / "host:disk.img").touch()
    for written, meant in {
        "disk.img": f"{conf}/disk.img",
        "../disk.img": f"{conf}/../disk.img",
        "/disk.img": "/disk.img",
        "~/disk.img": "/home/me/disk.img",
        "host:disk.img": f"{conf}/host:disk.img",
        "ssh://host/~/disk.img": "ssh://host/~/disk.img",
    }.items():
        assert read(f"images.a.source = '{written}'").images["a"].source == meant


# A text, and the one line that it gets.  The file's name stands before each.
MISTAKES = [
    # the file
    ("", ': names no image; write [images.NAME] and below it source = "…"'),
    ("images = {}", ': names no image; write [images.NAME] and below it source = "…"'),
    ("\n\nx = tru\n", ":3: Invalid value"),
    ("x = 'a\n", ":1: "),
    ("x = [1,\n2\n", ":2: Unclosed array"),
    ("x = " + "[" * 3000, ": brackets nested too deep"),
    ("x = " + "9" * 5000, ": Exceeds the limit"),
    # names
    ("[images.a]\nsource='/x'\n[images.a]\n", ":3: [images.a] is there twice"),
    ("[images.'a b']\n[images.\"a b\"]\n", ':2: [images."a b"] is there twice'),
    ("[images.a]\ntimeout=1\n'timeout'=2\n", ":3: this key is there twice"),
    ("[images.a]\nsource='/x'\n[images.'.imgfs']", ':3: [images.".imgfs"]: this name is reserved'),
    ("[images.originals]\nsource='/x'", ":1: [images.originals]: this name is reserved"),
    ("[images.'']", ':1: [images.""]: no directory can have this name'),
    ("[images.'.']", ':1: [images."."]: no directory can have this name'),
    ("[images.'..']", ':1: [images.".."]: no directory can have this name'),
    ("[images.'a/b']", ':1: [images."a/b"]: no directory can have this name'),
    ('[images."a\\u0000"]', ':1: [images."a\\u0000"]: no directory can have this name'),
    (
        f"[images.'{'é' * 125}']",
        ':1: [images."' + "é" * 125 + '"]: a name has 243 bytes at most',
    ),
    # tables and keys
    ("image.a.source='/x'", ':1: image: unknown key; did you mean "images"?'),
    ("timeout = 3", ":1: timeout: unknown key; it belongs under [defaults] or an [images.NAME]"),
    ("images = 3", ":1: images: expected a table, got a whole number"),
    ("defaults = []", ":1: defaults: expected a table, got a list"),
    ("[[images]]\n[[images]]", ":1: images: expected a table, got a list"),
    ("[images]\na = 3", ":2: [images] a: expected a table"),
    ("[[images.a]]\nsource='/x'", ":1: [images] a: expected a table"),
    ("[images.a]\ntimeout = 1", ":1: [images.a]: has no source"),
    (
        "[images.a]\nsource='/x'\ncommand=['x']",
        ":3: [images.a] command: there is a source already; an image has one of them",
    ),
    ("[images.a]\n\nsorce='/x'", ':3: [images.a] sorce: unknown key; did you mean "source"?'),
    ("[images.a]\nzzz=1", ":2: [images.a] zzz: unknown key; known are: format, backing, "),
    (
        "[images.disk.img]\nsource='/x'",
        ':1: [images.disk] img: unknown key; a name with a dot is quoted: ["images"."disk.img"]',
    ),
    ("[defaults]\nsource='/x'", ":2: [defaults] source: unknown key; an image has its own"),
    ("[defaults.s3]\n", ":1: [defaults] s3: unknown key; [s3] is for all images"),
    (
        "[images.a]\nsource='/x'\ns3 = {\nendpont='x'}".replace("\n}", "}").replace("{\n", "{"),
        ':3: [images.a.s3] endpont: unknown key; did you mean "endpoint"?',
    ),
    (
        "[images.a]\nsource='/x'\n[images.a.http]\nuser='me'",
        ":4: [images.a.http] user: unknown key; known are: authorization, ca_file, allow_http",
    ),
    # types
    ("[images.a]\nsource=3", ":2: [images.a] source: expected a text, got a whole number"),
    ("[images.a]\nsource=''", ":2: [images.a] source: is empty"),
    ('[images.a]\nsource="a\\u0000"', ":2: [images.a] source: there is a NUL in it"),
    ('[images.a]\ncommand=["a", "b\\u0000"]', ":2: [images.a] command: there is a NUL in it"),
    ("[images.a]\ncommand='nbdkit x'", ":2: [images.a] command: expected a list, got a text"),
    ("[images.a]\ncommand=[]", ":2: [images.a] command: is empty"),
    ("[images.a]\ncommand=[\n'a',\n3]", ":2: [images.a] command: expected a text, got a whole"),
    ("[images.a]\ncommand=['']", ":2: [images.a] command: is empty"),
    (
        "[images.a]\nformat='qcow3'",
        ":2: [images.a] format: 'qcow3' is none of raw, qcow2, vmdk, vdi, vhd, vhdx, qcow, qed, ",
    ),
    ("[images.a]\nhard='on'", ":2: [images.a] hard: expected true or false, got a text"),
    ("[images.a]\nextents='no'", ":2: [images.a] extents: 'no' is none of on, off"),
    ("[images.a]\nextents=1", ':2: [images.a] extents: expected "on" or "off", got a whole'),
    (
        "[images.a]\nhelpers=['ruby']",
        ":2: [images.a] helpers: 'ruby' is none of python3, perl, qemu-img",
    ),
    ("[images.a]\ntimeout=0", ":2: [images.a] timeout: expected a whole number >= 1"),
    ("[images.a]\ntimeout=1.5", ":2: [images.a] timeout: expected a whole number, got a fraction"),
    ("[images.a]\ntimeout=inf", ":2: [images.a] timeout: expected a whole number, got a fraction"),
    ("[images.a]\ntimeout=2000-01-01", ":2: [images.a] timeout: expected a whole number, got date"),
    ("[images.a]\ntimeout=true", ":2: [images.a] timeout: expected a whole number, got true or"),
    ("[images.a]\ncache_size=true", ":2: [images.a] cache_size: expected a size, got true or"),
    ("[images.a]\ncache_size=-1", ":2: [images.a] cache_size: expected a whole number >= 0"),
    (
        "[defaults]\ncache_size='2 giga'",
        ":2: [defaults] cache_size: '2 giga': not a size; write it like 512M or 10G",
    ),
    ("[defaults]\ncache_size='99999999P'", ":2: [defaults] cache_size: is too large"),
    ("[defaults]\nreadahead='of'", ":2: [defaults] readahead: 'of': not a size"),
    ("[defaults]\nprefetch='20 q'", ":2: [defaults] prefetch: '20 q': not a size"),
    ("[defaults]\nprefetch=0", ":2: [defaults] prefetch: nothing would ever come; write true"),
    ("[defaults]\nprefetch='0M'", ":2: [defaults] prefetch: nothing would ever come; write true"),
    ("[defaults]\nprefetch=[]", ':2: [defaults] prefetch: expected "off" or a size, got a list'),
    # meaning
    ("[images.a]\nsource='ftp://h/x'", ":2: [images.a] source: ftp:// sources are not supported"),
    ("[images.a]\nsource='host:x'", ":2: [images.a] source: host:x: no such file; if it is on a"),
    ("[images.a]\nsource='/x'\nbacking='ssh://h'", ":3: [images.a] backing: ssh://h: no host or"),
    (
        "[images.a]\nsource='/x'\nidentity='~/.ssh/id'",
        ":3: [images.a] identity: is any text that names the image's state; an ssh key is: key",
    ),
    ("[s3]\naccess_key='a'", ":2: [s3] access_key: is of no use without secret_key"),
    ("[s3]\nsecret_key='a'", ":2: [s3] secret_key: is of no use without access_key"),
    ("[s3]\nsession_token='a'", ":2: [s3] session_token: is of no use without access_key and"),
    ("[s3]\nendpoint='minio:9000'", ":2: [s3] endpoint: is no server; write it as https://host"),
    ("[s3]\nendpoint='http://u:p@h'", ":2: [s3] endpoint: is no server; write it as https://host"),
    ('[http]\nauthorization="a\\nb"', ":2: [http] authorization: there is a line break or the"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=[said[:40] for _, said in MISTAKES])
def test_mistakes(read: Loader, text: str, said: str) -> None:
    with pytest.raises(UsageError) as found:
        read(text)
    assert str(found.value).startswith("conf/images.toml" + said)
    assert str(found.value).isprintable()


def test_secrets_are_not_shown(read: Loader) -> None:
    """Neither by what an object prints nor by an error about it."""
    secret = "hunter2"
    keys = f'access_key = "a"\nsecret_key = "{secret}"\nsession_token = "{secret}"'
    image = f'[images.a]\ncommand = ["nbdkit", "password={secret}"]'
    http = f'[http]\nauthorization = "{secret}"'
    assert secret not in repr(read(f"{image}\n[s3]\n{keys}\n{http}"))
    for wrong in (
        f'[s3]\nsecret_key = ["{secret}"]',
        f'[s3]\nendpoint = "http://a:{secret}@b"',
        f'[http]\nauthorization = "{secret}\\n"',
        f'[http]\nauthorization = "{secret}',
        f"[http]\nauthorization = {secret}",
        f'{image}\nsource = "https://me:{secret}@host/x"',
        f'[images.a]\nsource = "ssh://me:{secret}@host/x"',
    ):
        with pytest.raises(UsageError) as found:
            read(wrong)
        assert secret not in str(found.value)


def test_secrets_that_others_can_read_are_warned_of(read: Loader, tmp_path: Path) -> None:
    path = tmp_path / "conf/images.toml"
    secret = "images.a.source = '/x'\ns3 = {access_key = 'a', secret_key = 'b'}"
    assert read(secret).warnings == ()
    path.chmod(0o640)
    said = "conf/images.toml: others can read the secrets in it; chmod 600 it"
    assert read(secret).warnings == (said,)
    assert read("images.a.source = '/x'\nhttp.authorization = 'b'").warnings == (said,)
    assert read("images.a.source = 'https://host/x?signature=b'").warnings == (said,)
    assert read("images.a.source = '/x'\ns3.region = 'b'").warnings == ()


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"# \n\xff = 1\n")
    (tmp_path / "huge").write_bytes(b"#" * (4 << 20) + b"\n")
    os.mkfifo(tmp_path / "pipe")
    for name, said in {
        "missing": ": No such file or directory",
        ".": ": Is a directory",
        "pipe": ": is not a file",
        "binary": ":2: is not UTF-8",
        "huge": ": is too large for a TOML file",
    }.items():
        with pytest.raises(UsageError) as found:
            load(tmp_path / name)
        assert str(found.value) == f"{tmp_path / name}{said}"


def quoted(name: str) -> str:
    """As a basic string of TOML."""
    plain = (c if c.isalnum() else f"\\U{ord(c):08x}" for c in name)
    return f'"{"".join(plain)}"'


NAMES = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["", ".", "..", "...", ".imgfs", "originals", "a/b", "x" * 249, "x" * 250, "a.b", "%"]
)


@given(st.lists(NAMES, min_size=1, unique=True))
def test_names(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Every name that a directory can have is taken as it is; the others are an error of a line."""
    path = tmp_path_factory.mktemp("names", numbered=True) / "images.toml"
    path.write_text("".join(f"[images.{quoted(name)}]\nsource = '/x'\n" for name in names))

    def is_good(name: str) -> bool:
        if name in ("", ".", "..", ".imgfs", "originals") or "/" in name or "\0" in name:
            return False
        return len(os.fsencode(name)) <= 243

    bad = [number for number, name in enumerate(names) if not is_good(name)]
    if not bad:
        assert list(load(path).images) == names
        return
    with pytest.raises(UsageError) as found:
        load(path)
    assert str(found.value).startswith(f"{path}:{bad[0] * 2 + 1}: [images.")
    assert str(found.value).isprintable()


PLACES = ["srv/", "/srv/images/", "ssh://kool/srv/", "s3://images/", "{}/pool"]


@pytest.mark.parametrize("source", PLACES)
def test_a_directory_is_no_image(read: Loader, tmp_path: Path, source: str) -> None:
    (tmp_path / "pool").mkdir()
    with pytest.raises(UsageError, match=r"images\.toml:2: \[images\.a\] source: is a directory"):
        read(f"[images.a]\nsource = '{source.format(tmp_path)}'\n")
    # What a link leads to may be another mount, which is looked at when the image is used.
    (tmp_path / "link").symlink_to("pool")
    assert read(f"[images.a]\nsource = '{tmp_path}/link'\n").images["a"].source


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_as_windows_editors_save_it(tmp_path: Path, end: str) -> None:
    path = tmp_path / "images.toml"
    text = (
        f"# a comment{end}[images.a]{end}source = '/a.img'{end}{end}[images.b]{end}sauce = 1{end}"
    )
    path.write_bytes(codecs.BOM_UTF8 + text.encode())
    with pytest.raises(UsageError, match=r":6: \[images.b\] sauce"):
        load(path)
    path.write_bytes(codecs.BOM_UTF8 + text.replace("sauce = 1", "source = '/b.img'").encode())
    assert [image.source for image in load(path).images.values()] == ["/a.img", "/b.img"]
    path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    with pytest.raises(UsageError, match="is UTF-16; save it as UTF-8"):
        load(path)
