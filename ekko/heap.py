"""How the C library gives memory back: not between two batches.

Each message that arrives is a block of its own, some hundred KiB, freed when the last receiver has it. glibc gives blocks of
that size back to the kernel at once, or trims the heap when a few of them are free together, and takes them again for the next
message: pages to be mapped, zeroed and faulted in, 3 to 10 faults a batch on a node that forwards.
"""

import ctypes
from typing import Final

# From malloc.h.
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
# Free memory at the end of the heap that is kept: what may be on its way to one peer (`p2p.link.links.CREDIT_BYTES_MAX`),
# twice.
KEPT_BYTES: Final = 64 << 20
# Blocks from this size on are given back when they are freed; the largest value that glibc takes.
BLOCK_BYTES_MAX: Final = 32 << 20


def keep_freed_memory() -> bool:
    """Have the allocator keep the memory of freed messages for the next ones; False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Both: to set one switches off that glibc adapts the other.
    return bool(mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES_MAX) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
