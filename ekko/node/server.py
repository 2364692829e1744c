"""The node's side of its parameter server: a process of its own, started when the node serves, and again when it ends.

The process writes through the node's local endpoint like any publisher, and reads its shared memory like any reader. What it
cannot know by itself it is told here, on its standard input (`ekko.train.server.channel`): which nodes of other servers there
are, which of their lives are over for good, and whether the others have all that this node has of a model.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import structlog

from ekko.config.sections import ModelSection, NodeConfig, ServerSection
from ekko.errors import EkkoError
from ekko.model import training_name
from ekko.operations import Operations
from ekko.server_picture import ServerPicture
from ekko.store import Store
from p2p import messages as m
from p2p.machine import Machine
from p2p.runtime import read_clock

LINE_BYTES_MAX: Final = 1 << 20  # as `ekko.train.server.channel` has it, which this need not load
LOOK_S: Final = 0.1  # how often what is known of the others is compared with what was told
CAUGHT_UP_MS: Final = 1_000
ANSWERS_MAX: Final = 64  # questions of the process at once; more are answered with a refusal
# Bytes that the process has not read: it is stopped, or stuck. It is told what is so by then when it reads again.
UNREAD_BYTES_MAX: Final = 1 << 20
AGAIN_S: Final = 0.2  # before a process that ended is started again, twice as long each time
AGAIN_S_MAX: Final = 10.0
STEADY_S: Final = 30.0  # one that ran so long is not the same trouble again
STOP_S_MAX: Final = 4.0  # for what is under way to be answered
ERROR_MAX: Final = 2_000

log = structlog.get_logger(__name__)


class TrainingServer:
    """Runs the server beside one life of a node, until it is cancelled or stopped.

    Args:
        config: of the node.
        store: its models.
        machine: knows the other nodes.
        operations: asks them.
        ready: whether the node has caught up with its cluster.
    """

    def __init__(
        self, config: NodeConfig, store: Store, machine: Machine, operations: Operations, ready: Callable[[], bool]
    ) -> None:
        assert config.server is not None, "only a node with [server] has one"
        self._section: ServerSection = config.server
        self._config = config
        self._store = store
        self._machine = machine
        self._operations = operations
        self._ready = ready
        self.picture = ServerPicture(self._section.endpoint)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._answers: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Start the process, and start it again whenever it ends."""
        again_s = AGAIN_S
        while not self._ready():  # noqa: ASYNC110 - nobody tells when; /readyz is looked at, too
            await asyncio.sleep(LOOK_S)
        while not self._stopping:
            began = time.monotonic()
            error = await self._live()
            if self._is_stopping():
                return
            if time.monotonic() - began > STEADY_S:
                again_s = AGAIN_S
            self.picture = replace(self.picture, running=False, failures=self.picture.failures + 1, error=error[:ERROR_MAX])
            log.error("server_ended", reason=error, again_s=again_s)
            await asyncio.sleep(again_s)
            again_s = min(AGAIN_S_MAX, 2 * again_s)

    def _is_stopping(self) -> bool:
        return self._stopping

    async def stop(self) -> None:
        """End the process; what it is at has a moment, while the node still serves."""
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
                "ekko.train.server",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
            )
        except OSError as problem:
            return f"the server process cannot be started: {problem}"
        self._process = process
        self.picture = replace(self.picture, running=True, starts=self.picture.starts + 1, state={})
        log.info("server_started", process=process.pid, endpoint=self._section.endpoint)
        telling = asyncio.get_running_loop().create_task(self._tell(process))
        reason = ""
        try:
            reason = await self._listen(process)
        except ValueError:  # a line longer than any of ours
            reason = "the server process said what makes no sense"
        finally:
            telling.cancel()
            for answer in self._answers:
                answer.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
        return reason or f"the server process ended with {process.returncode}"

    # --- what it is told

    def _write(self, process: asyncio.subprocess.Process, **what: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(what).encode() + b"\n")

    async def _tell(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        self._write(process, begin=self._begin())
        told: dict[str, object] = {}
        while True:
            lives: dict[str, object] = {name: self._lives(name) for name in self._section.models}
            if lives != told and process.stdin.transport.get_write_buffer_size() < UNREAD_BYTES_MAX:
                self._write(process, lives=lives)
                told = lives
            await asyncio.sleep(LOOK_S)

    def _begin(self) -> dict[str, Any]:
        """As `ekko.train.server.channel.Begin` has it."""
        config, security, own = self._config, self._config.security, self._machine.own_life
        return {
            "node": config.node.id,
            "boot": own.boot,
            "boot_ms": own.boot_ms,
            "run_dir": str(config.node.run_dir),
            "local": config.node.local,
            "server": self._section.model_dump(mode="json"),
            "shards": {name: config.models.get(name, ModelSection()).shards for name in self._section.models},
            "security": None if security is None else {"key_file": str(security.key_file), "allow": str(security.allow)},
        }

    def _lives(self, name: str) -> list[dict[str, object]]:
        """As `ekko.train.server.events.NodeLife` has it; of whom it is not known what they hold, all."""
        held = self._store.models.get(training_name(name))
        if held is None:  # it was dropped
            return []
        return [
            {
                "node": life.node,
                "boot_ms": life.boot_ms,
                "boot": life.boot,
                "holds": list(range(held.spec.partitions) if life.holds is None else life.holds),
                "expelled": life.expelled,
                "gone": life.gone,
            }
            for life in self._machine.lives_of(held.spec.id, read_clock())
        ]

    # --- what it says

    async def _listen(self, process: asyncio.subprocess.Process) -> str:
        """Until it ends; why it says that it does."""
        assert process.stdout is not None
        reason = ""
        async for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue  # something else wrote to its output
            match said:
                case {"state": dict(state)}:
                    self.picture = replace(self.picture, state=state)
                case {"ask": int(number), "model": str(model)}:
                    answer = asyncio.get_running_loop().create_task(self._answer(process, number, model))
                    self._answers.add(answer)
                    answer.add_done_callback(self._answers.discard)
                case {"error": str(error)}:
                    reason = error
        await process.wait()
        return reason

    async def _answer(self, process: asyncio.subprocess.Process, number: int, model: str) -> None:
        """Whether the others have all that this node has of a model."""
        try:
            held = self._store.models.get(model)
            if held is None or len(self._answers) > ANSWERS_MAX:
                raise EkkoError(f"model {model!r} is not here, or too much is asked at once")
            answer = await self._operations.wait_caught_up(held.spec.id, CAUGHT_UP_MS)
        except EkkoError as error:
            answer = m.Refused(0, str(error))
        if isinstance(answer, m.Refused):
            self._write(process, caught_up=number, lagging=(), silent=(), refused=answer.reason or "no answer")
        else:
            self._write(process, caught_up=number, lagging=answer.lagging, silent=answer.silent, refused="")
