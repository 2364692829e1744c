"""What docs/gpu.md works out: bytes of rows, ceilings, and how many warps fit."""

import pytest

from benchmarks.device import static, tables
from gpu.layout import Shape
from gpu.nvrtc import ARCHES, Resources


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "block", "part"),
    [  # as CUDA's occupancy calculator has them
        (80, 32, 0, 256, 1.0),
        (80, 33, 0, 256, 0.75),  # registers are given by eights
        (80, 64, 0, 256, 0.5),
        (80, 65, 0, 256, 0.375),
        (80, 128, 0, 256, 0.25),
        (80, 255, 0, 256, 0.125),
        (86, 64, 0, 256, 32 / 48),
        (75, 64, 0, 256, 1.0),
        (90, 32, 0, 32, 0.5),  # 32 blocks of one warp
        (80, 32, 48 << 10, 256, 0.375),  # three blocks of 48 KB and 1 KB
        (75, 32, 48 << 10, 256, 0.25),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, block: int, part: float) -> None:
    assert static.occupancy(Resources(registers, shared, 0, 0), arch, block) == pytest.approx(part)


def test_each_architecture_has_its_bounds() -> None:
    assert tuple(static.MULTIPROCESSORS) == ARCHES


def test_bytes_of_a_row() -> None:
    shape = Shape(1, 64, "float32")
    assert static.lookup_bytes(shape) == 32 + 32 + 256 + 8 + 256 + 8
    assert static.pooled_bytes(shape, 1) == 32 + 32 + 256 + 8 + 256 + 8
    assert static.pooled_bytes(shape, 264) == 32 + 32 + 256 + 8 + 1
    assert static.apply_bytes(shape) == 32 + 32 + 32 + 256 + 8 + 8 + 256 + 1
    assert static.gather_bytes(shape) == 8 + 256 + 256
    small = Shape(1, 64, "int8")  # 68 bytes, in chunks 80, in sectors 96
    assert static.lookup_bytes(small) == 32 + 32 + 96 + 8 + 256 + 8


def test_the_document_has_these_tables() -> None:
    text = tables.DOCUMENT.read_text()
    for line in (*tables.costs(), *tables.roofline()):
        assert f"{line}\n" in text
    million = dict(zip(static.MEMORIES, (2_627, 3_444, 5_659, 8_108), strict=True))
    assert {name: rates["lookup"] for name, rates in static.roofline(Shape(1, 64, "float32")).items()} == million


def test_registers_are_read_back_from_a_table() -> None:
    taken = {"lookup": {arch: Resources(40 + arch % 7, 0, 0, 0) for arch in ARCHES}}
    text = tables.replaced("<!-- registers -->\nold\n<!-- end -->\n", "registers", tables.registers(taken))
    assert "old" not in text
    assert tables.listed(text) == {("lookup", arch): 40 + arch % 7 for arch in ARCHES}
