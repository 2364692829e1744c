"""Sending beside training: a thread that takes what is due between two steps, and publishes it while training goes on.

Weights change while an optimizer steps; during the forward and backward passes they are only read. A gate is between the
two: the trainer passes it when a step begins, whoever copies holds it while it does. So a batch is the model as it was at one
moment, and the trainer waits for a copy at most (a bounded one), never for the network.

What the thread computes in Python it takes from the trainer, who cannot run meanwhile. So there are batches as often as they
take up a small share of the time: a trainer with slow steps has a batch for each, one with fast steps a batch for
several, of which each row is sent once.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Final

from ekko.errors import NodeUnreachable

# Of a batch in the background, so that no copy takes long: some 2 ms.
COPY_BYTES_MAX: Final = 8 << 20
# Of one core, for batches, by default; and how long a batch waits for it at most. The trainer loses two to three times that: it
# waits for the interpreter, and is given it back later than the thread has done with it.
SHARE: Final = 0.005
PAUSE_S_MAX: Final = 0.25
# A copy begins when a step has ended, so that the next one is far away; but when none ends within this time, now.
STEP_WAIT_S: Final = 0.01
# After a failed call, doubling.
RETRY_S: Final = 0.05
RETRY_S_MAX: Final = 1.0
_LOOK_S: Final = 0.5  # nothing that matters is found by looking; it is told


class Gate:
    """Keeps the steps of a trainer and the copies of its state apart. `enter` and `leave` are for the thread that trains.

    Each side says first what it is about to do, and then looks at the other: of two that begin at once at least one sees that,
    since the interpreter runs one instruction at a time. So a step that meets no copy takes no lock, which would be 2 us. Where
    both are about to begin the step waits.
    """

    def __init__(self) -> None:
        self.waited_s = 0.0  # the trainer, in all
        self.begin_anew()

    def begin_anew(self) -> None:
        """Also in a forked process, where nobody is left who would end what is under way."""
        self._lock = threading.Lock()  # held while somebody copies, or is about to
        self._inside = False  # a step is under way,
        self._wanted = False  # and a copy, or is about to be
        self._left = threading.Event()  # a step that a copy may wait for has ended

    def enter(self) -> bool:
        """A step begins, or the first one of several that are one; False: it had begun."""
        if self._inside:
            return False
        self._inside = True
        if self._wanted:
            self.leave()
            begin = time.perf_counter()
            with self._lock:
                self._inside = True
            self.waited_s += time.perf_counter() - begin
        return True

    def leave(self) -> None:
        """The step has ended, if one had begun."""
        self._inside = False
        if self._wanted:
            self._left.set()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """No step is under way meanwhile."""
        with self._lock:
            self._wanted = True
            try:
                while self._inside:
                    self._left.wait()
                    self._left.clear()
                yield
            finally:
                self._wanted = False


class Sender:
    """The thread that sends.

    Args:
        send: sends what is due, a bounded part of it; False: nothing was.
        is_due: whether anything is, as far as can be told without the gate.
        share: of one core, that it may take.
    """

    def __init__(self, send: Callable[[], bool], is_due: Callable[[], bool], share: float = SHARE) -> None:
        self._send = send
        self._share = share
        self._is_due = is_due
        self.waits = False  # whether it is to be told of the end of a step
        self.calls = True  # whether a step is to look, when it has ended: at `waits`, `error`, or at whatever else there may be
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._stop: SimpleQueue[None] = SimpleQueue()
        self.error: BaseException | None = None  # of the last attempt; none is made until the thread that trains takes it
        self.trouble: NodeUnreachable | None = None  # why the last call failed; None: it did not
        self.sending = threading.Lock()  # held by whoever sends
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="ekko-track", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End, when what is under way has ended; wait for that, `timeout` seconds at most. What is due stays so."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.put(None)
            self._wake.put(None)
            thread.join(timeout)

    @property
    def runs(self) -> bool:
        """Whether there is a thread."""
        return self._thread is not None

    def wake(self) -> None:
        """A step has ended."""
        self.waits = False
        self._wake.put(None)

    def _run(self) -> None:
        retry_s = RETRY_S
        pause_s = 0.0
        while not self._stopped(pause_s):
            if not self._step_ended():
                continue
            begin = time.thread_time()
            with self.sending:  # until it is noted how that ended: who sends next may see to it
                try:
                    self._send()
                    self.trouble, retry_s = None, RETRY_S
                    pause_s = min((time.thread_time() - begin) / self._share, PAUSE_S_MAX)
                except NodeUnreachable as error:  # training goes on meanwhile, and what is due adds up
                    self.trouble, pause_s = error, retry_s
                    retry_s = min(2 * retry_s, RETRY_S_MAX)
                except BaseException as error:  # noqa: BLE001 - it is raised where the user sees it: out of the next step
                    self.error, pause_s = error, RETRY_S
                    self.calls = True

    def _step_ended(self) -> bool:
        """Wait for the end of a step if one is near; whether there is anything to send then."""
        self.waits = self.calls = True
        due = self.error is None and self._is_due()
        try:
            self._wake.get(timeout=STEP_WAIT_S if due else _LOOK_S)
        except Empty:
            self.waits = False
        return self.error is None and self._is_due()

    def _stopped(self, pause_s: float) -> bool:
        """Pause; whether to end instead."""
        try:
            self._stop.get(block=pause_s > 0, timeout=pause_s or None)
        except Empty:
            return False
        return True
