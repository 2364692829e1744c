"""What can be told of the kernels without a device: registers, spills, how many of them fit, and the roofline.

The roofline is the memory's bandwidth by the bytes that one row moves. A sector of 32 bytes is the least that device memory is
asked for; rows, headers and digests are whole sectors. Keys and outcomes are read and written side by side and cost their size.
"""

from dataclasses import dataclass
from typing import Final

from gpu.layout import BUCKET_SLOTS, HEADER_BYTES, SECTOR_BYTES, Shape
from gpu.nvrtc import ARCHES, Resources, compile_for
from gpu.sources import load, names

BLOCK: Final = 256  # threads
WARP: Final = 32
BAG_KEYS: Final = 20


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """Bounds of one multiprocessor, from the table of compute capabilities in CUDA's programming guide."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65_536
    partitions: int = 4  # each has its share of the registers
    registers_unit: int = 256  # a warp gets a multiple of it


MULTIPROCESSORS: Final = {
    75: Multiprocessor(32, 16, 64 << 10),
    80: Multiprocessor(64, 32, 164 << 10),
    86: Multiprocessor(48, 16, 100 << 10),
    89: Multiprocessor(48, 24, 100 << 10),
    90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10),
}


@dataclass(frozen=True, slots=True)
class Memory:
    """Device memory, by its maker's data sheet."""

    bytes_per_s: float


MEMORIES: Final = {
    "A100 40 GB": Memory(1.555e12),
    "A100 80 GB": Memory(2.039e12),
    "H100 SXM": Memory(3.35e12),
    "H200": Memory(4.8e12),
}


def resources(arches: tuple[int, ...] = ARCHES) -> dict[str, dict[int, Resources]]:
    """Kernel -> architecture -> what it takes; functions that are called count as kernels without registers."""
    found: dict[str, dict[int, Resources]] = {}
    for name in names():
        source = load(name)
        for arch in arches:
            for function, taken in compile_for(source, arch).functions.items():
                found.setdefault(function, {})[arch] = taken
    return found


def occupancy(taken: Resources, arch: int, block: int = BLOCK) -> float:
    """The part of a multiprocessor's warps that can be resident."""
    bounds = MULTIPROCESSORS[arch]
    warps = -(-block // WARP)
    by_warp = -(-max(1, taken.registers) * WARP // bounds.registers_unit) * bounds.registers_unit
    resident = bounds.registers // bounds.partitions // by_warp * bounds.partitions
    # Some architectures keep a kilobyte of a block's shared memory to themselves.
    shared = taken.shared_bytes + (1024 if arch >= 80 else 0)
    blocks = min(resident // warps, bounds.warps // warps, bounds.blocks, bounds.shared_bytes // max(1, shared))
    return blocks * warps / bounds.warps


def lookup_bytes(shape: Shape) -> int:
    """Device memory that a look-up of one row moves: digests, header and row are read; key in, row and stamp out."""
    return SECTOR_BYTES + HEADER_BYTES + _sectors(shape.stride) + 8 + 4 * shape.dim + 8


def pooled_bytes(shape: Shape, bag_keys: int = BAG_KEYS) -> int:
    """The same of one key of a bag: digests, header, row and key are read; of the bag a sum is written and two offsets read."""
    return SECTOR_BYTES + HEADER_BYTES + _sectors(shape.stride) + 8 + round((4 * shape.dim + 8) / bag_keys)


def apply_bytes(shape: Shape) -> int:
    """The same for an update of a row that is there: digests, header, key, stamp, row in; row, header, outcome out."""
    return SECTOR_BYTES + 2 * HEADER_BYTES + _sectors(shape.stride) + 8 + 8 + shape.row_bytes + 1


def gather_bytes(shape: Shape) -> int:
    """What `torch.embedding` moves for a float32 row whose place is known: position, row in, row out."""
    return 8 + 2 * 4 * shape.dim


def _sectors(size: int) -> int:
    return -(-size // SECTOR_BYTES) * SECTOR_BYTES


def roofline(shape: Shape) -> dict[str, dict[str, float | int | str]]:
    """Memory -> millions of rows a second that its bandwidth allows."""
    return {
        name: {
            "lookup": round(memory.bytes_per_s / lookup_bytes(shape) / 1e6),
            "pooled": round(memory.bytes_per_s / pooled_bytes(shape) / 1e6),
            "apply": round(memory.bytes_per_s / apply_bytes(shape) / 1e6),
            "torch.embedding": round(memory.bytes_per_s / gather_bytes(shape) / 1e6),
        }
        for name, memory in MEMORIES.items()
    }


def row_costs(dims: tuple[int, ...] = (16, 64, 128)) -> list[dict[str, float | int | str]]:
    """Bytes of device memory a slot, and bytes moved a row, by dim and codec."""
    return [
        {
            "dim": dim,
            "codec": codec,
            "row_bytes": shape.row_bytes,
            "slot_bytes": shape.slot_bytes,
            "overhead": round(shape.slot_bytes / shape.row_bytes - 1, 3),
            "lookup_bytes": lookup_bytes(shape),
            "apply_bytes": apply_bytes(shape),
        }
        for dim in dims
        for codec in ("float32", "float16", "int8")
        for shape in [Shape(1, dim, codec)]
    ]


assert HEADER_BYTES == SECTOR_BYTES == BUCKET_SLOTS  # what the sums above rely on
