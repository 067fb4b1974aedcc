"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.errors import UsageError
from imgfs.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1k", 1 << 10),
        ("1K", 1 << 10),
        ("10G", 10 << 30),
        ("1.5MiB", 3 << 19),
        ("2 TB", 2 << 40),
        (" 3p ", 3 << 50),
        ("9007199254740993", 9007199254740993),  # more than a float can tell
    ],
)
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "k",
        "-1",
        "+1",
        "1e3",
        "0x10",
        "1,5G",
        ".5G",
        "1.G",
        "1KK",
        "1 G B",
        "\u0661",
        "9" * 400,
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (1 << 40, "1.0 TiB"),
        (5000 << 50, "5000.0 PiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 62))
def test_formatted_sizes_parse_to_nearly_the_same(size: int) -> None:
    found = parse_size(format_size(size).replace("bytes", ""))
    assert abs(found - size) <= size * 0.06
