"""Reading and listing through a real S3 server, SeaweedFS."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import obstore.store
import pytest

from imgfs.config.options import Options, parse_options
from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    NotAnImage,
    SourceChanged,
    SourceNotFound,
    SourceUnreachable,
    UsageError,
)
from imgfs.sources.base import Identity
from imgfs.sources.bridge import Bridge
from imgfs.sources.objects.pages import PAGE, Entry, list_objects
from imgfs.sources.objects.settings import ObjectSettings, from_environment
from imgfs.sources.objects.source import ObjectSource
from tests.servers.ports import free_port
from tests.servers.web import Bucket, Weed

from .conftest import MIB, run
from .web import url_of, use


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    server = Weed(tmp_path_factory.mktemp("weed"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def bucket(weed: Weed) -> Bucket:
    found = Bucket(weed)
    found.put("first", b"x")
    return found


def settings(weed: Weed, **changes: Any) -> dict[str, Any]:
    return {
        "endpoint": weed.endpoint,
        "access_key_id": weed.key,
        "secret_access_key": weed.secret,
        **changes,
    }


async def nothing(_: ObjectSource) -> None:
    return


def test_bytes(weed: Weed, bucket: Bucket) -> None:
    data = os.urandom(9 * MIB + 5)
    bucket.put("a dir/é?#%41.img", data)

    async def check(source: ObjectSource) -> None:
        assert source.name == "é?#%41.img"
        assert source.size == len(data)
        assert source.stat.identity is not None
        assert source.stat.identity.kind == "etag"
        assert abs(source.stat.mtime_ns / 1e9 - time.time()) < 60
        assert await source.read(0, len(data)) == data
        for offset, length in ((1, 1), (2 * MIB - 1, 2), (len(data) - 3, 3), (5, 3 * MIB)):
            assert await source.read(offset, length) == data[offset : offset + length]
        await source.check_identity()

    use("s3://images/a%20dir/é?#%2541.img", check, **settings(weed))


def test_empty(weed: Weed, bucket: Bucket) -> None:
    bucket.put("empty", b"")

    async def check(source: ObjectSource) -> None:
        assert source.size == 0
        await source.check_identity()

    use("s3://images/empty", check, **settings(weed))


def test_change_is_noticed(weed: Weed, bucket: Bucket) -> None:
    bucket.put("changing", bytes(MIB))

    async def check(source: ObjectSource) -> None:
        await source.read(0, 10)
        bucket.put("changing", b"\1" * MIB)
        with pytest.raises(SourceChanged):
            await source.read(0, 10)
        with pytest.raises(SourceChanged):
            await source.check_identity()
        obstore.delete(bucket.store, "changing")
        with pytest.raises(SourceChanged, match="deleted"):
            await source.read(0, 10)

    use("s3://images/changing", check, **settings(weed))


def test_refusals(weed: Weed, bucket: Bucket) -> None:
    wrong = settings(weed, secret_access_key="wrong")
    stranger = settings(weed, access_key_id="stranger")
    nobody = {"endpoint": weed.endpoint}
    away = settings(weed, endpoint=f"http://127.0.0.1:{free_port()}")
    cases: list[tuple[str, dict[str, Any], type[ImgfsError], str]] = [
        ("s3://images/missing", settings(weed), SourceNotFound, "no such file"),
        ("s3://no-such-bucket/x", settings(weed), SourceNotFound, "no such bucket"),
        ("s3://images/first", wrong, AccessDenied, "secret key is not.*access key tester"),
        ("s3://images/first", stranger, AccessDenied, "does not know.*access key stranger"),
        ("s3://images/first", nobody, AccessDenied, "no AWS_ACCESS_KEY_ID"),
        ("s3://images/first", {**nobody, "profile": "x"}, AccessDenied, "AWS_PROFILE is not"),
        ("s3://images/first", away, SourceUnreachable, "refused"),
        ("s3://images/first", settings(weed, endpoint="127.0.0.1"), UsageError, "begins with"),
        ("s3://images/first", settings(weed, ca_file="/no/file"), UsageError, "/no/file"),
        ("s3://images/", settings(weed), NotAnImage, "directory"),
    ]
    for url, how, error, said in cases:
        with pytest.raises(error, match=said) as caught:
            use(url, nothing, **how)
        assert weed.secret not in str(caught.value)
        assert str(caught.value).isprintable()


def test_settings_win_over_the_environment(
    weed: Weed, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "other")
    use("s3://images/first", nothing, **settings(weed))


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://a")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hidden")
    monkeypatch.setenv("IMGFS_HTTP_AUTHORIZATION", "hidden")
    found = Options(timeout=7).objects()
    assert found == ObjectSettings(
        timeout_s=7,
        endpoint="https://a",
        region="eu-west-1",
        access_key_id="key",
        secret_access_key="hidden",
        session_token="hidden",
        authorization="hidden",
    )
    assert "hidden" not in repr(found)
    assert from_environment({}) == ObjectSettings()
    half = {"AWS_ACCESS_KEY_ID": "key"}
    with pytest.raises(UsageError, match="AWS_SECRET_ACCESS_KEY is not"):
        from_environment(half)


@pytest.mark.parametrize(
    "word", ["secret_access_key", "access_key_id", "token", "s3_session_token", "password"]
)
def test_no_secret_is_an_option(word: str) -> None:
    with pytest.raises(UsageError, match="environment") as caught:
        parse_options((f"{word}=hidden",))
    assert "hidden" not in str(caught.value)


def listed(weed: Weed, url: str, **changes: Any) -> list[list[Entry]]:
    async def main() -> list[list[Entry]]:
        bridge = Bridge()
        try:
            how = ObjectSettings(**settings(weed, timeout_s=5, **changes))
            return [page async for page in list_objects(url_of(url), how, bridge)]
        finally:
            await bridge.aclose()

    found: list[list[Entry]] = run(main)
    return found


def test_listing(weed: Weed, bucket: Bucket) -> None:
    names = ["a.img", "sub/a", "sub/b", "sub/c/d", "sub-x", "sub.y", "sub", "é", "zz/1", "z z%"]
    for name in names:
        bucket.put(f"list/{name}", name.encode())
    bucket.put("listing", b"not in it")

    async def its_identity(source: ObjectSource) -> Identity | None:
        return source.stat.identity

    identity = use("s3://images/list/sub.y", its_identity, **settings(weed))
    for url in ("s3://images/list/", "s3://images/list"):
        (page,) = listed(weed, url)
        files = {entry.name: entry for entry in page if not entry.is_directory}
        assert {name: entry.size for name, entry in files.items()} == {
            name: len(name.encode()) for name in names if "/" not in name
        }
        assert [e.name for e in page if e.is_directory] == ["sub", "zz"]
        assert abs(files["é"].mtime_ns / 1e9 - time.time()) < 60
        assert files["é"].etag is not None

        assert files["sub.y"].etag == identity.token.removesuffix(f":5@{weed.endpoint}")
    assert listed(weed, "s3://images/list/nothing/") == [[]]
    top = {entry.name for page in listed(weed, "s3://images") for entry in page}
    assert {"first", "list", "listing"} <= top


def test_listing_by_pages(weed: Weed, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page ends in the middle of a directory, and the next goes on behind it."""
    names = [f"n{n:02}" for n in range(7)] + [f"many/{n:03}" for n in range(25)] + ["x", "y/1", "z"]
    for name in names:
        bucket.put(f"paged/{name}", b"")
    monkeypatch.setattr("imgfs.sources.objects.pages.PAGE", 4)
    pages = listed(weed, "s3://images/paged/")
    assert all(len(page) <= 4 for page in pages)
    assert len(pages) <= 5
    found = [(entry.name, entry.is_directory) for page in pages for entry in page]
    wanted = [(name, False) for name in names if "/" not in name]
    assert sorted(found) == sorted([*wanted, ("many", True), ("y", True)])
    assert PAGE == 1000


def test_listing_refusals(weed: Weed, bucket: Bucket) -> None:
    with pytest.raises(AccessDenied, match="access key stranger"):
        listed(weed, "s3://images/", access_key_id="stranger")
    with pytest.raises(SourceNotFound, match="no such bucket"):
        listed(weed, "s3://no-such-bucket/")
    with pytest.raises(SourceUnreachable, match="refused"):
        listed(weed, "s3://images/", endpoint=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UsageError, match="only s3"):
        listed(weed, "http://127.0.0.1/x")


def test_local_files_pay_for_none_of_it(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "disk").write_bytes(b"x")
    program = (
        "import sys, trio\n"
        "import imgfs\n"
        "async def main():\n"
        "    async with imgfs.open_image(sys.argv[1]):\n"
        "        pass\n"
        "trio.run(main)\n"
        "print(*({'obstore', 'asyncio', 'asyncssh', 'uvloop', 'nbd'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "\n"
