"""How a node's process begins: the imports of what it is made of, in four fifths of their time."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What libraries import where it is there: Numba to compile products of matrices, structlog to draw errors, which logs here have
# as text.
UNWANTED = "scipy", "rich"


@contextmanager
def brisk_imports() -> Iterator[None]:
    """Import within this what a node is made of, NumPy included. For a process that is a node's, and nothing else."""
    # NumPy starts a thread for each core, for products of matrices: a node has none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    unwanted = [name for name in UNWANTED if name not in sys.modules]
    for name in unwanted:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python is told that there is no such module
    # Half a million objects that all stay: no look at them finds garbage, neither now nor later.
    gc.disable()
    try:
        # Python takes memory for the frames of calls by chunks. Where a chunk is just full, each call takes one from the kernel
        # and gives it back, and these two make many calls: they come first, not at the end of a long chain of imports.
        import numba  # noqa: F401

        import ekko.store  # noqa: F401

        yield
    finally:
        gc.freeze()
        gc.enable()
        for name in unwanted:
            del sys.modules[name]
