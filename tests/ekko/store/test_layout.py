"""The layout's documentation says what the code does, and the structures fit where they are put."""

from pathlib import Path

import pytest

from ekko.store import layout

DOCUMENT = Path(__file__).parents[3] / "docs/reference/shared-memory-layout.md"


@pytest.mark.parametrize("structure", layout.STRUCTURES, ids=lambda structure: structure.name)
def test_the_document_shows_every_field_where_it_is(structure: layout.Structure) -> None:
    lines = ["| offset | bytes | field | meaning |", "|---:|---:|---|---|"]
    for field in structure.fields:
        length = f"{field.bytes:,}" if field.bytes else "the rest"
        lines.append(f"| {field.offset:,} | {length} | `{field.name}` | {field.meaning} |")
    assert "\n".join(lines) + "\n\n" in DOCUMENT.read_text()


def test_the_document_names_the_version() -> None:
    assert f"Layout version: **{layout.LAYOUT_VERSION}**" in DOCUMENT.read_text()


def test_words_are_aligned() -> None:
    for structure in layout.STRUCTURES:
        for field in structure.fields:
            assert field.offset % min(8, field.bytes or 8) == 0, f"{structure.name}.{field.name}"


def test_records_fit_their_room() -> None:
    assert layout.UNDO.end <= layout.UNDO_BYTES
    assert layout.CONTROL.end <= layout.CONTROL_BYTES
    assert layout.ENTRY.end == layout.ENTRY_BYTES
    assert layout.ROW.offset("data") == layout.ROW_HEADER_BYTES
    assert layout.model_bytes(64) == layout.MODEL.offset("vector") + 2 * 64 * 4096 * 8 + layout.SHARDS_MAX // 8


@pytest.mark.parametrize("row_bytes", [1, 4, 60, 64, 256, 65_536])
def test_strides_hold_header_and_row_and_keep_words_aligned(row_bytes: int) -> None:
    stride = layout.row_stride(row_bytes)
    assert stride % 8 == 0
    assert 24 + row_bytes <= stride < 24 + row_bytes + 8


def test_overlapping_fields_are_refused() -> None:
    with pytest.raises(AssertionError, match="overlaps"):
        layout.Structure("bad", (layout.Field("a", 0, 8, ""), layout.Field("b", 4, 4, "")))
