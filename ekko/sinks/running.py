"""A process whose work is one feed: until a signal, and saying now and then how it is. `ekko sink`, and a node's companion."""

import importlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ekko.errors import ConfigError
from ekko.serve.feeding import Feed
from ekko.serve.session import FeedCounts
from ekko.serve.sink import Sink
from ekko.sinks.target import check_target, is_redis

RATE_S: Final = 10.0  # what is told of rows in a second is over this long, or since it was told last


def sink_of(target: str, name: str, prefix: str) -> Sink:
    """The sink that a target names.

    Args:
        target: see `ekko.sinks.target`.
        name: in redis, of the feed.
        prefix: in redis, of all names.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
    """
    check_target(target)
    if is_redis(target):
        from ekko.sinks import RedisSink

        return RedisSink(target, name=name, prefix=prefix)
    module, _, function = target.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{target!r} cannot be loaded: {error}") from error
    if not isinstance(made, Sink):
        raise ConfigError(f"{target!r} returned a {type(made).__name__}: expected an ekko.serve.Sink")
    return made


def run(feed: Feed, every_s: float, tell: Callable[[FeedCounts, int], None]) -> None:
    """Run a feed until SIGTERM or SIGINT.

    Args:
        feed: not begun.
        every_s: how often `tell` is called, and once more at the end.
        tell: with how the feed is, and its rows in a second lately; in a thread of its own.

    Raises:
        what `Feed.run` does.
    """
    ended = threading.Event()
    before = deque([(time.monotonic(), 0)])

    def tell_now() -> None:
        counts, now = feed.counts, time.monotonic()
        while len(before) > 1 and now - before[0][0] > RATE_S:
            before.popleft()
        since, rows = before[0]
        before.append((now, counts.rows))
        tell(counts, round((counts.rows - rows) / max(now - since, 0.001)))

    def tell_on() -> None:
        while not ended.wait(every_s):
            tell_now()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: feed.stop())
    teller = threading.Thread(target=tell_on, name="ekko-sink-counts", daemon=True)
    teller.start()
    try:
        feed.run()
    finally:
        ended.set()
        teller.join()
        tell_now()
