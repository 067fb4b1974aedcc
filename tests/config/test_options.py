"""`-o`: what is taken, what is left to the kernel, and what is said of the rest."""

from __future__ import annotations

import pytest

from imgfs.config.options import Options, parse_options
from imgfs.errors import UsageError


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ("rw,relatime,nodiratime,strictatime,lazytime,iversion,mand,silent,comment=x,x-y=z", ()),
        ("ro,noexec", ("noexec",)),
        ("sync,dirsync", ("sync", "dirsync")),
        ("noexec,nosuid,nodev,exec,async", ()),  # as of user,exec in fstab
    ],
)
def test_what_stands_in_fstabs(given: str, kernel: tuple[str, ...]) -> None:
    assert parse_options((given,)) == Options(read_only="ro," in given, kernel=kernel)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nonsense", "unknown option"),
        ("extents=1", "say extents=on or extents=off"),
        ("write=yes", "say write=through"),
        ("write", "say write=through"),
        ("ro=1", "takes no value"),
        ("noexec=1", "takes no value"),
        ("key=", "has no value"),
        ("timeout=-1", "not a number of 0 or more"),
        ("cache_size='lots'", None),
        ("prefetch=fast", None),
    ],
)
def test_the_option_is_named(given: str, said: str | None) -> None:
    with pytest.raises(UsageError) as found:
        parse_options(("ro", given))
    name = given.partition("=")[0]
    assert str(found.value).startswith(f"-o {name}")
    assert (f"-o {given}: {said}" == str(found.value)) if said else "not a size" in str(found.value)


def test_a_remount_is_refused() -> None:
    with pytest.raises(UsageError, match="unmount it, and mount it anew"):
        parse_options(("remount,ro,relatime",))
