"""Work of one model that takes longer than a look-up: in threads, a few at once, and repeated until it is done."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import structlog

from ekko.errors import EkkoError

# Of one model at once: a group, its wait, a served step, a comparison, and some that load or flush.
JOBS_MAX: Final = 8
AGAIN_S: Final = 0.05  # after which a job that failed is tried again, at first
AGAIN_S_MAX: Final = 2.0

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Jobs:
    """Those of one model. On the event loop.

    Args:
        model: the model's name.
        fail: called with what ends the process: an error that is none of ekko's.
    """

    def __init__(self, model: str, fail: Callable[[BaseException], None]) -> None:
        self._model = model
        self._fail = fail
        self._threads = ThreadPoolExecutor(JOBS_MAX, f"model-{model}")
        self._jobs: set[asyncio.Task[None]] = set()
        self.trouble = ""  # why one of them is tried again

    def begin(self, job: Coroutine[Any, Any, None]) -> None:
        """Have it done beside everything else."""
        task = asyncio.get_running_loop().create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def repeated(self, what: str, work: Callable[[], T]) -> T:
        """The result of a piece of work in a thread, which is tried until it succeeds; `what`: its name, for operators."""
        again_s = AGAIN_S
        while True:
            try:
                result = await asyncio.get_running_loop().run_in_executor(self._threads, work)
            except EkkoError as error:
                if self.trouble != (trouble := f"{what}: {error}"):
                    log.warning("server_job_failed", model=self._model, job=what, reason=str(error))
                self.trouble = trouble
                await asyncio.sleep(again_s)
                again_s = min(AGAIN_S_MAX, 2 * again_s)
            else:
                if self.trouble.startswith(f"{what}:"):
                    self.trouble = ""
                return result

    async def drained(self) -> None:
        """Return when nothing is under way any more."""
        while self._jobs:
            await asyncio.wait(self._jobs)

    def close(self) -> None:
        """Give up what is under way; what it leaves half done is put right at the next start."""
        for job in self._jobs:
            job.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
