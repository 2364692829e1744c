"""What every chapter begins with, and how it ends early."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sim_cluster.demo import data
from sim_cluster.demo.cluster import DemoError
from sim_cluster.demo.data import Events
from sim_cluster.demo.display import Display


@contextlib.contextmanager
def opened(out: Path, display: Display, *, synthetic: bool, seed: int) -> Iterator[tuple[Events, Path]]:
    """The events, and a folder for what nobody needs afterwards; `out` is there.

    Raises:
        DemoError: `out` cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: {error.strerror}") from None
    with orderly_stop(), tempfile.TemporaryDirectory(prefix="ekko-demo-") as scratch:
        display.phase("events")
        events = data.load(synthetic=synthetic, seed=seed)
        if events.note:
            display.warn(f"SYNTHETIC EVENTS, not real data: {events.note}")
        yield events, Path(scratch)


@contextlib.contextmanager
def orderly_stop() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind everything, once: a second one must not cut the cleaning up short."""

    def stop(number: int, _: object) -> NoReturn:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before: dict[int, Any] = {}  # Any: what signal.signal takes and returns
    for one in (signal.SIGINT, signal.SIGTERM):
        before[one] = signal.signal(one, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
