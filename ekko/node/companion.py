"""A process that a node starts beside itself: started again whenever it ends, and stopped with the node.

What is said is in `ekko.companions.channel`.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Final

import structlog

from ekko.companions.picture import ProcessPicture

LINE_BYTES_MAX: Final = 1 << 20  # as `ekko.companions.channel` has it
# Bytes that the process has not read: it is stopped, or stuck.
UNREAD_BYTES_MAX: Final = 1 << 20
AGAIN_S: Final = 0.2  # before a process that ended is started again, twice as long each time
AGAIN_S_MAX: Final = 10.0
STEADY_S: Final = 30.0  # one that ran so long is not the same trouble again
STOP_S_MAX: Final = 4.0  # for what is under way to be finished
ERROR_MAX: Final = 2_000  # characters of why it ended

log = structlog.get_logger(__name__)


class Companion:
    """One process at a time, until it is stopped or `run` is cancelled.

    Args:
        kind: what it is, as logs name it: "server".
        module: what it runs, with `python -m`.
        begin: what its first line is to say.
        hear: called with what it says, but for why it ends; called after `picture` has its state.
        tell: goes on telling it things; begun with each process, and cancelled with it.
        labels: which one it is, in logs.
    """

    def __init__(
        self,
        kind: str,
        module: str,
        begin: Callable[[], Mapping[str, Any]],
        *,
        hear: Callable[[Mapping[str, Any]], None] = lambda _: None,
        tell: Callable[[], Coroutine[Any, Any, None]] | None = None,
        labels: Mapping[str, str],
    ) -> None:
        self.picture = ProcessPicture()
        self._kind = kind
        self._module = module
        self._begin = begin
        self._hear = hear
        self._tell = tell
        self._labels = labels
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def run(self) -> None:
        """Start the process, and start it again whenever it ends."""
        again_s = AGAIN_S
        while not self._stopping:
            began = time.monotonic()
            error = await self._live()
            if self._is_stopping():
                return
            if time.monotonic() - began > STEADY_S:
                again_s = AGAIN_S
            self.picture = replace(
                self.picture,
                running=False,
                failures=self.picture.failures + 1,
                error=error[:ERROR_MAX],
                error_ms=time.time_ns() // 1_000_000,
            )
            log.error(f"{self._kind}_ended", **self._labels, reason=self.picture.error, again_s=again_s)
            await asyncio.sleep(again_s)
            again_s = min(AGAIN_S_MAX, 2 * again_s)

    def _is_stopping(self) -> bool:
        return self._stopping

    async def stop(self) -> None:
        """End the process; what it is at has a moment. Afterwards `run` is to be cancelled."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S_MAX)

    async def _live(self) -> str:
        """One process, from its start to its end; why it ended."""
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
            )
        except OSError as problem:
            return f"the {self._kind} process cannot be started: {problem}"
        self._process = process
        self.picture = replace(self.picture, running=True, starts=self.picture.starts + 1, state={})
        log.info(f"{self._kind}_started", process=process.pid, **self._labels)
        self.say(begin=self._begin())
        telling = None if self._tell is None else asyncio.get_running_loop().create_task(self._tell())
        reason = ""
        try:
            reason = await self._listen(process)
        except ValueError:  # a line longer than any of ours
            reason = f"the {self._kind} process said what makes no sense"
        finally:
            if telling is not None:
                telling.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
        return reason or f"the {self._kind} process ended with {process.returncode}"

    def say(self, **what: Any) -> None:
        """One line to the process that runs now."""
        self._input.write(json.dumps(what).encode() + b"\n")

    @property
    def listens(self) -> bool:
        """Whether it has read most of what it was told, so that it may be told more."""
        return self._input.transport.get_write_buffer_size() < UNREAD_BYTES_MAX

    @property
    def _input(self) -> asyncio.StreamWriter:
        assert self._process is not None, "only while there is a process"
        assert self._process.stdin is not None
        return self._process.stdin

    async def _listen(self, process: asyncio.subprocess.Process) -> str:
        """Until it ends; why it says that it does."""
        assert process.stdout is not None
        reason = ""
        async for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue  # something wrote to its output before it was the channel's
            match said:
                case {"error": str(error)}:
                    reason = error
                case {"state": dict(state)}:
                    self.picture = replace(self.picture, state=state)
                    self._hear(said)
                case _:
                    self._hear(said)
        await process.wait()
        return reason
