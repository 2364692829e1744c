"""The feed: brings what changes on a node to a foreign store, from a process beside the node or from a thread of yours.

It reads the node's shared memory and calls nobody but the sink. The node notes which rows changed in a ring
(`ekko.store.changes`), which the feed follows with a look at one word when there is nothing to do. The ring is the only queue
there is: a row that changed again while it waited is sent once, in its newest version, so that a slow sink gets fewer rows and
never older ones. When the ring has gone round, rows above what the sink has are found by a walk over the model, in parts. So
neither side takes memory that grows. What happens in which order is in `ekko.serve.session`.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from ekko.errors import SinkError, StoreError
from ekko.model import check_name
from ekko.serve.attachment import not_for_us
from ekko.serve.cursor import Place
from ekko.serve.session import FeedCounts, Moment, Session
from ekko.serve.sink import Sink
from ekko.serve.source import Source

# How often an idle feed looks at the ring, and less often after a while. A look takes some 10 us of a core.
POLL_S: Final = 0.001
POLL_IDLE_S: Final = 0.005
IDLE_AFTER_S: Final = 1.0
# Between attempts to reach a sink, or a store that is replaced.
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 5.0
ERROR_MAX: Final = 2_000  # characters of an error that are kept


class Feed:
    """Of one model, into one sink. `ekko.serve.feed` starts one in a thread; `run` is for a process of its own.

    Args:
        run_dir: the node's.
        model: the model's name, not an alias.
        sink: where to.
        tables: those that are to be fed; None: all, those that come later too.

    Raises:
        ModelError: `model` is no name.
    """

    def __init__(self, run_dir: str | Path, model: str, sink: Sink, *, tables: Sequence[str] | None = None) -> None:
        self.model = check_name("model", model)
        self._run_dir = Path(run_dir)
        self._sink = sink
        self._chosen = tables
        self._counts = FeedCounts()
        self._source: Source | None = None
        self._session: Session | None = None
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._asked = self._answered = 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def counts(self) -> FeedCounts:
        """What it did and how it is, a copy."""
        return replace(self._counts)

    @property
    def place(self) -> Place | None:
        """Up to where changes of the node are in the sink; None: neither has been opened, or one failed."""
        session = self._session
        return None if session is None else session.place

    def start(self) -> Self:
        """Run in a thread of this process."""
        self._thread = threading.Thread(target=self._run_quietly, name=f"ekko-feed-{self.model}", daemon=True)
        self._thread.start()
        return self

    def run(self) -> None:
        """Feed until `stop`. A node or a sink that is not there is waited for.

        Raises:
            ModelError: the model was dropped, its name is an alias, or the sink has no room for a table.
            whatever else than `SinkError` the sink raises.
        """
        wait_s, idle_since = RETRY_S_MIN, time.monotonic()
        try:
            while not self._stopping.is_set():
                try:
                    busy = self.turn()
                except (SinkError, StoreError, FileNotFoundError) as error:
                    self._begin_again(error)
                    self._stopping.wait(wait_s)
                    wait_s = min(2 * wait_s, RETRY_S_MAX)
                    continue
                wait_s = RETRY_S_MIN
                now = time.monotonic()
                if busy:
                    idle_since = now
                else:
                    self._stopping.wait(POLL_S if now - idle_since < IDLE_AFTER_S else POLL_IDLE_S)
            self.leave_cursor()
        finally:
            self.stop()
            self._sink.close()

    def stop(self) -> None:
        """Have `run` end after the batch at hand. Safe in any thread, and in a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """Stop the thread, wait for it, and let go of the sink.

        Raises:
            whatever ended the feed before.
        """
        self.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_failure()

    def __enter__(self) -> Self:
        return self if self._thread is not None else self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def flush(self, timeout: float) -> None:
        """Wait until everything that the node has now is in the sink, and nothing else is. Of a feed that was started.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: it is not yet; the message says what is in the way.
            whatever ended the feed.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            self._asked += 1
            wanted = self._asked
            while self._answered < wanted:
                self._raise_failure()
                left = deadline - time.monotonic()
                if left <= 0 or self._stopping.is_set():
                    raise TimeoutError(f"the sink of model {self.model!r} does not have everything: {self._in_the_way()}")
                self._changed.wait(min(left, 1.0))

    def _in_the_way(self) -> str:
        counts = self._counts
        if self._stopping.is_set():
            return "its feed was stopped"
        if counts.error:
            return counts.error
        if counts.walking:
            return "not all rows have been sent yet"
        if counts.sweeping:
            return "what the sink has beside the node's rows is removed when the node has caught up with the others"
        return f"{counts.behind} changes wait"

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:  # noqa: BLE001 - told to whoever flushes or closes
            self._failure = error
            self._counts.error = f"{type(error).__name__}: {error}"[:ERROR_MAX]
            with self._changed:
                self._changed.notify_all()

    def turn(self) -> bool:
        """Do a bounded part of what there is to do; False when there was nothing. What `run` does again and again.

        Raises:
            SinkError, StoreError, FileNotFoundError: try again later, with the same feed.
            ModelError: as `run`.
        """
        moment = Moment(self._asked, time.time_ns() // 1_000_000)
        if self._session is None or self._source is None or self._source.retired:
            self._session = None
            self._source = self._attach()
            self._session = Session(self._source, self._sink, self._counts)
        busy, complete = self._session.turn(moment)
        self._counts.error = ""  # before who waits is told
        if complete is not None:
            self._counts.through_ms = complete.unix_ms
            if complete.asked > self._answered:
                with self._changed:
                    self._answered = complete.asked
                    self._changed.notify_all()
        return busy

    def _attach(self) -> Source:
        try:
            return Source(self._run_dir, self.model, self._chosen)
        except PermissionError as error:
            raise not_for_us(error, self._run_dir) from error

    def _begin_again(self, error: Exception) -> None:
        """Something failed: where the sink is is what it says when it is opened again."""
        self._session = self._source = None
        self._counts.retries += 1
        self._counts.through_ms = 0
        self._counts.error = f"{error}"[:ERROR_MAX]

    def leave_cursor(self) -> None:
        """Leave the cursor with the sink, so that the next feed need not send the last second again; `run` ends with it."""
        if self._session is not None:
            try:
                self._session.commit()
            except SinkError as error:
                self._counts.error = f"{error}"[:ERROR_MAX]


def feed(run_dir: str | Path, model: str, sink: Sink, *, tables: Sequence[str] | None = None) -> Feed:
    """Begin to feed a sink with a model of the node on this machine, in a thread of this process.

    Args:
        run_dir: the node's.
        model: the model's name, not an alias.
        sink: where to.
        tables: those that are to be fed; None: all, those that come later too.

    Returns:
        The feed; use it in a `with` block, or `close` it. `flush` waits, `counts` tells.

    Raises:
        ModelError: `model` is no name.
    """
    return Feed(run_dir, model, sink, tables=tables).start()
