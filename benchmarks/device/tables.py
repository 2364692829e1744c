"""The tables of docs/gpu.md, from the layout and the compiler: `python -m benchmarks.device.tables` writes them there."""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device import static
from gpu.layout import Shape
from gpu.nvrtc import ARCHES, Resources

DOCUMENT = Path(__file__).parent.parent.parent / "docs/gpu.md"


def costs() -> list[str]:
    """Bytes of a slot and of a row that moves."""
    head = _line("dim", "codec", "row", "a slot", "beside the row", "moved by a look-up", "by an update")
    return [head, "|---:|---|" + "---:|" * 5] + [
        f"| {one['dim']} | {one['codec']} | {one['row_bytes']} | {one['slot_bytes']} | {100 * float(one['overhead']):.0f} % "
        f"| {one['lookup_bytes']} | {one['apply_bytes']} |"
        for one in static.row_costs()
    ]


def roofline() -> list[str]:
    """Millions of rows a second, by memory."""
    shape = Shape(1, 64, "float32")
    rates = static.roofline(shape)
    moved = (
        f"look-up, {static.lookup_bytes(shape)} bytes",
        f"pooled, {static.pooled_bytes(shape)} bytes",
        f"update, {static.apply_bytes(shape)} bytes",
    )
    return [_line("memory", "bandwidth (data sheet)", *moved, "`torch.embedding`"), "|---|" + "---:|" * 5] + [
        f"| {name} | {static.MEMORIES[name].bytes_per_s / 1e12:.2f} TB/s | "
        + " | ".join(f"{int(rate):,}" for rate in of.values())
        + " |"
        for name, of in rates.items()
    ]


def registers(taken: dict[str, dict[int, Resources]]) -> list[str]:
    """A line a kernel, a column an architecture."""
    lines = [_line("kernel", *(f"sm_{arch}" for arch in ARCHES)), "|---|" + "---:|" * len(ARCHES)]
    for kernel, of in sorted(taken.items()):
        cells = (f"{one.registers} ({100 * static.occupancy(one, arch):.0f} %)" for arch, one in of.items())
        lines.append(_line(f"`{kernel}`", *cells))
    return lines


def listed(text: str) -> dict[tuple[str, int], int]:
    """(kernel, architecture) -> registers, of the document."""
    found: dict[tuple[str, int], int] = {}
    for kernel, cells in re.findall(r"^\| `(\w+)` \|((?: \d+ \(\d+ %\) \|)+)$", text, re.M):
        numbers = re.findall(r"(\d+) \(", cells)
        found |= {(kernel, arch): int(number) for arch, number in zip(ARCHES, numbers, strict=True)}
    return found


def replaced(text: str, name: str, lines: Sequence[str]) -> str:
    """The document with these lines between `<!-- NAME -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->\n)", re.S)
    assert pattern.search(text), name
    return pattern.sub(lambda match: match[1] + "".join(f"{line}\n" for line in lines) + match[2], text)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write them."""
    text = DOCUMENT.read_text()
    text = replaced(text, "costs", costs())
    text = replaced(text, "roofline", roofline())
    text = replaced(text, "registers", registers(static.resources()))
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
