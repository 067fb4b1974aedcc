"""What a descriptor says, and which files are parts of others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.errors import CorruptImage, ImgfsError, UnsupportedFeature
from imgfs.formats.vmdk_descriptor import ExtentLine, is_part, parse
from tests.formats.vmdk_images import text

TYPICAL = b"""# Disk DescriptorFile
version=1
encoding="windows-1252"
CID=fffffffe
parentCID=ffffffff
isNativeSnapshot="no"
createType="twoGbMaxExtentSparse"

# Extent description
RW 4192256 SPARSE "Windows \xe9-s001.vmdk"
RDONLY\t2048  SPARSE\t"a b-s002.vmdk"
RW 63 ZERO
RW 10 FLAT "part.vmdk" 128

# Change Tracking File
changeTrackPath="x-ctk.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "522"
 junk = that = means nothing
"""


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b" \n\n"])
def test_a_typical_one(end: bytes) -> None:
    content = TYPICAL.replace(b"\n", end)
    found = parse("x", b"\xef\xbb\xbf" + content + b"\0\0garbage")
    assert (found.create_type, found.cid, found.parent_name) == (
        "twoGbMaxExtentSparse",
        0xFFFFFFFE,
        "",
    )
    assert found.extents == (
        ExtentLine("SPARSE", 4192256, "Windows é-s001.vmdk"),
        ExtentLine("SPARSE", 2048, "a b-s002.vmdk"),
        ExtentLine("ZERO", 63),
        ExtentLine("FLAT", 10, "part.vmdk", 128),
    )


@pytest.mark.parametrize(
    "spelling", ["parentCID = 00c0ffee", 'parentcid="C0FFEE"', "parentCID=c0ffee"]
)
def test_spellings(spelling: str) -> None:
    found = parse(
        "x",
        text("custom", more=f'{spelling}\nparentFileNameHint = "../b a.vmdk"').replace(
            b"parentCID=ffffffff\n", b""
        ),
    )
    assert (found.parent_cid, found.parent_name) == (0xC0FFEE, "../b a.vmdk")


@pytest.mark.parametrize("encoding", ["UTF-8", "", "nonsense", "zlib", "idna", "windows-9999"])
def test_names_that_are_bytes(encoding: str) -> None:
    content = text("custom", "@").replace(b"@", b'RW 1 FLAT "\xc3\xa9\xff" 0')
    found = parse("x", b'encoding="%s"\n' % encoding.encode() + content)
    assert [line.name for line in found.extents] == ["é\udcff"]


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"", CorruptImage, "no createType"),
        (b"\0" * 99, CorruptImage, "no createType"),
        (text("custom").replace(b"version=1", b"version=4"), UnsupportedFeature, "version='4'"),
        (text("fullDevice"), UnsupportedFeature, "createType='fullDevice'"),
        (text("vmfsRawDeviceMap"), UnsupportedFeature, "createType='vmfsRawDeviceMap'"),
        (text("custom", cid="xyz"), CorruptImage, "CID='xyz'"),
        (text("custom", cid="123456789"), CorruptImage, "CID='123456789'"),
        (text("custom", more='parentFileNameHint="a"'), CorruptImage, "by one only"),
        (text("custom", more="parentCID=00000001"), CorruptImage, "by one only"),
        (text("custom", 'RW 1 VMFSRDM "a"'), UnsupportedFeature, "type VMFSRDM"),
        (text("custom", 'NOACCESS 1 FLAT "a" 0'), UnsupportedFeature, "not to be read"),
        (text("custom", "RW 1 FLAT"), CorruptImage, "names no file"),
        (text("custom", 'RW 1 SPARSE ""'), CorruptImage, "names no file"),
        (text("custom", f'RW {1 << 55} FLAT "a" 0'), CorruptImage, "size is absurd"),
        (text("custom", f'RW {"9" * 5000} FLAT "a" 0'), CorruptImage, "size is absurd"),
        (text("custom", f'RW 1 FLAT "a" {"9" * 5000}'), CorruptImage, "offset is absurd"),
        (text("custom", *["RW 1 ZERO"] * 8193), UnsupportedFeature, "more than 8192"),
    ],
)
def test_refused(content: bytes, error: type[ImgfsError], match: str) -> None:
    with pytest.raises(error, match=f"^disk.vmdk: descriptor: .*{match}"):
        parse("disk.vmdk", content)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_anything(before: bytes, after: bytes) -> None:
    content = before + b'\nRW 1 FLAT "a" 0\ncreateType="custom"\n' + after
    try:
        found = parse("x", content)
        assert any(line.name == "a" for line in found.extents) or b"encoding" in content
    except ImgfsError as exc:
        assert str(exc).startswith("x: descriptor: ")


def test_names_of_parts() -> None:
    parts = ["a-s001.vmdk", "a-f012.vmdk", "a-flat.vmdk", "a-delta.vmdk", "a-000001-delta.vmdk"]
    parts += ["a b-000002-sesparse.vmdk", "A-SESPARSE.VMDK", "a-s1000.vmdk", "a-000001-s002.vmdk"]
    assert [name for name in parts if not is_part(name)] == []
    disks = ["a.vmdk", "a-000001.vmdk", "-flat.vmdk", "s001.vmdk", "a-s01.vmdk", "a-flat.raw"]
    disks += ["flat.vmdk", "a-flat.vmdk.bak", "a-flat-1.vmdk", "a-xs001.vmdk"]
    assert [name for name in disks if is_part(name)] == []
