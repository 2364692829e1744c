"""Every kernel compiles for every architecture, and needs registers only: no spills, no stack frame."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.device.tables import DOCUMENT, listed
from gpu.nvrtc import ARCHES, compile_for
from gpu.sources import FOLDER, load, names

# What a thread may take so that two blocks of 256 fit a multiprocessor of each architecture.
REGISTERS_MAX = 128
# How far a kernel may move from what docs/gpu.md says of it; `python -m benchmarks.device.tables` writes it anew.
REGISTERS_AWAY_MAX = 8
LISTED = listed(DOCUMENT.read_text())


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", names())
def test_a_kernel_asks_for_registers_only(name: str, arch: int) -> None:
    source = load(name)
    binary = compile_for(source, arch)
    assert set(source.kernels) == {function for function, taken in binary.functions.items() if taken.registers}
    assert source.kernels
    for function, taken in binary.functions.items():
        assert (taken.spill_bytes, taken.stack_bytes) == (0, 0), f"{function} of {name}.cu on sm_{arch}: {taken}"
        assert taken.registers <= REGISTERS_MAX
        assert taken.registers == pytest.approx(LISTED[function, arch], abs=REGISTERS_AWAY_MAX)
        assert "warning" not in binary.log, binary.log


def test_a_kernel_that_is_pressed_is_found_out() -> None:
    """The check above can fail: for blocks so large that a thread has 64 registers, the widest kernel spills."""
    source = load("lookup")
    pressed = replace(source, text=re.sub(r"^KERNEL\(\d+,", "KERNEL(1024,", source.text, flags=re.M))
    (taken,) = compile_for(pressed, 80).functions.values()
    assert taken.registers <= 64
    assert taken.spill_bytes > 0
    assert taken.stack_bytes > 0


def test_no_kernel_is_forgotten() -> None:
    assert {kernel for kernel, _ in LISTED} == {kernel for name in names() for kernel in load(name).kernels}
    texts = [path.read_text() for path in Path(FOLDER).glob("*.cu*")]
    assert sum(text.count("__global__") for text in texts) == 1  # of the macro: no kernel is declared past it
    assert {"lookup", "pooled", "apply", "insert", "erase", "sweep", "export_rows"} <= {
        kernel for name in names() for kernel in load(name).kernels
    }
