"""Images of which one field or one table entry is changed, beside qemu-img."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.formats import fields
from tests.formats.fuzz_corpus import Subject

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
CASES = None if LONG else 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return fields.corpus(tmp_path_factory.mktemp("corpus"))


def test_every_structure_has_its_fields(corpus: list[Subject]) -> None:
    assert len(corpus) > 15
    assert all(fields.ours(each, each.content) is not None for each in corpus)
    named = {each.name: {field.name for field in fields.fields_of(each)} for each in corpus}
    assert {"header.l1_table_offset", "L1[0]", "L1[0] L2[0]", "refcounts[0]"} <= named["qcow2"]
    assert {"snapshot 1.l1_table_offset"} <= named["qcow2-snapshots"]
    assert {"header.offBlocks", "map[3]"} <= named["vdi"]
    assert {"footer.data_offset", "copy.data_offset", "blocks[0]"} <= named["vhd"]
    assert {"header 1.log_offset", "region 0.1.length", "BAT[0]"} <= named["vhdx"]
    assert {"header.rgdOffset", "header.gdOffset"} <= named["vmdk"]


@pytest.mark.timeout(24 * 3600 if LONG else 300)
def test_one_field_is_changed(corpus: list[Subject], tmp_path: Path) -> None:
    counts, wrong = fields.run(corpus, tmp_path, CASES)
    assert not wrong
    assert counts["refused"] > 0
    assert counts["both read"] > 0
