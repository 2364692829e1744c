"""Locks that a child process finds open, whichever thread of its parent held them at the fork."""

import os
import threading
from typing import Self
from weakref import WeakSet


class ForkSafeLock:
    """A `threading.Lock` for `with`. What it guards has to be whole at every moment, or to be made anew by who comes next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _made.add(self)

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Forget who held it: that thread does not exist in this process."""
        self._lock = threading.Lock()


_made: "WeakSet[ForkSafeLock]" = WeakSet()


def _renew_all() -> None:
    for lock in list(_made):
        lock.renew()


os.register_at_fork(after_in_child=_renew_all)
