"""How a node's process begins: the imports of what it is made of, in two thirds of their time."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def brisk_imports() -> Iterator[None]:
    """Import within this what a node is made of, NumPy included. For a process that is a node's, and nothing else."""
    # NumPy starts a thread for each core, for products of matrices: a node has none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Numba imports SciPy, where there is one, to compile such products: as above.
    unwanted = "scipy" not in sys.modules
    if unwanted:
        sys.modules["scipy"] = None  # type: ignore[assignment]  # how Python is told that there is no such module
    # Half a million objects that all stay: no look at them finds garbage, neither now nor later.
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if unwanted:
            del sys.modules["scipy"]
