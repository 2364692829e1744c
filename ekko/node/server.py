"""The node's side of its parameter server, a companion (`ekko.node.companion`) that is started when the node serves.

The process writes through the node's local endpoint like any publisher, and reads its shared memory like any reader. What it
cannot know by itself it is told here (`ekko.train.server.channel`): which nodes of other servers there are, which of their
lives are over for good, and whether the others have all that this node has of a model.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from ekko.companions.picture import ServerPicture
from ekko.config.sections import ModelSection, NodeConfig, ServerSection
from ekko.errors import EkkoError
from ekko.model import training_name
from ekko.node.companion import Companion
from ekko.operations import Operations
from ekko.rollback.facts import Rollbacks
from ekko.store import Store
from p2p import messages as m
from p2p.machine import Machine
from p2p.runtime import read_clock

LOOK_S: Final = 0.1  # how often what is known of the others is compared with what was told
CAUGHT_UP_MS: Final = 1_000
ANSWERS_MAX: Final = 64  # questions of the process at once; more are answered with a refusal


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
        labels = {"endpoint": self._section.endpoint}
        self._process = Companion("server", "ekko.train.server", self._begin, hear=self._hear, tell=self._tell, labels=labels)
        self._answers: set[asyncio.Task[None]] = set()

    @property
    def picture(self) -> ServerPicture:
        """How it is."""
        return ServerPicture(self._section.endpoint, self._process.picture)

    async def run(self) -> None:
        """Start the process, and start it again whenever it ends."""
        while not self._ready():  # noqa: ASYNC110 - nobody tells when; /readyz is looked at, too
            await asyncio.sleep(LOOK_S)
        await self._process.run()

    async def stop(self) -> None:
        """End the process; what it is at has a moment, while the node still serves."""
        await self._process.stop()

    # --- what it is told

    async def _tell(self) -> None:
        told: dict[str, object] = {}
        taken_back = {name: self._taken_back(name) for name in self._section.models}
        try:
            while True:
                for name, before in taken_back.items():
                    if (last := self._taken_back(name)) is not None and last != before and self._process.listens:
                        self._process.say(taken_back=[name])
                        taken_back[name] = last
                lives: dict[str, object] = {name: self._lives(name) for name in self._section.models}
                if lives != told and self._process.listens:
                    self._process.say(lives=lives)
                    told = lives
                await asyncio.sleep(LOOK_S)
        finally:
            for answer in self._answers:  # nobody hears them any more
                answer.cancel()

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
        if held is None or name not in self._store.models:  # it was dropped
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

    def _taken_back(self, name: str) -> tuple[int, ...] | None:
        """Which rollbacks of a served model and of what is trained of it were the last; None: one goes on."""
        known = self._store.facts.of(Rollbacks)
        models = [model for one in (name, training_name(name)) if (model := self._store.generation(one)) is not None]
        if any(known.running(model) is not None for model in models):
            return None
        return tuple(0 if (last := known.current(model)) is None else last.epoch for model in models)

    # --- what it says

    def _hear(self, said: Mapping[str, Any]) -> None:
        match said:
            case {"ask": int(number), "model": str(model)}:
                answer = asyncio.get_running_loop().create_task(self._answer(number, model))
                self._answers.add(answer)
                answer.add_done_callback(self._answers.discard)

    async def _answer(self, number: int, model: str) -> None:
        """Whether the others have all that this node has of a model."""
        try:
            held = self._store.models.get(model)
            if held is None or len(self._answers) > ANSWERS_MAX:
                raise EkkoError(f"model {model!r} is not here, or too much is asked at once")
            answer = await self._operations.wait_caught_up(held.spec.id, CAUGHT_UP_MS)
        except EkkoError as error:
            answer = m.Refused(0, str(error))
        if isinstance(answer, m.Refused):
            self._process.say(caught_up=number, lagging=(), silent=(), refused=answer.reason or "no answer")
        else:
            self._process.say(caught_up=number, lagging=answer.lagging, silent=answer.silent, refused="")
