"""The versioned row store in shared memory: written by one daemon, read by any number of processes without a call to it.

`docs/reference/shared-memory-layout.md` shows what lies where.
"""

import gc

# A tenth of the time that this import takes would go into looks at objects that all stay.
_collects = gc.isenabled()
gc.disable()
try:
    from ekko.store.kernels.claims import COMPILED
    from ekko.store.store import Store
    from p2p import loops
finally:
    if _collects:
        gc.enable()

loops.install(COMPILED)

__all__ = ["Store", "warm"]


def warm() -> None:
    """Have every kernel ready. They are compiled, or loaded from the cache, when their modules are imported."""
    from ekko.store import view  # noqa: F401
    from ekko.store.kernels import checks, weighing  # noqa: F401
