"""A limit of time for somebody else's Python: what loops for ever is interrupted, where the system can do that.

The system's timer sends SIGALRM, whose handler runs in the main thread between two instructions of the interpreter, and raises
there. It stops a loop in Python; one call into C that does not return, it cannot. It needs the main thread, where a node's loop
is, and that nobody else uses SIGALRM: else there is no limit.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

# What catches the first one is told again so often.
AGAIN_S: Final = 0.1


class TooLongError(BaseException):
    """What ran was interrupted. No `Exception`, for code that catches all of those and goes on."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise `TooLongError` from what runs inside, once it has taken so long.

    Raises:
        TooLongError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        yield
        return
    inside = True

    def on_alarm(_signal: int, _frame: FrameType | None) -> None:
        if inside:  # else: it came between the end and the timer's
            raise TooLongError(f"interrupted after {seconds:g} s")

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
