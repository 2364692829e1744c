"""What a node and the server beside it say to each other, over the channel of a companion (`ekko.companions.channel`).

To the server: first `begin`, who it is; then `lives` whenever they change, what the node knows of the nodes of other servers;
`taken_back`, models of which a rollback is over; and `caught_up`, answers. From the server: `state`, twice a second, for
whoever looks at the node; `ask`, a question whether the others have all that the node has of a model; `error`, why it ends.

The node's end is `ekko.node.server`.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ekko.companions.channel import Channel
from ekko.train.server.events import NodeLife

CAUGHT_UP_MS: Final = 1_000  # for which the node waits for one answer


@dataclass(frozen=True, slots=True)
class Begin:
    """Who the server is: the node beside it, and that node's configuration as far as it concerns the server."""

    node: str
    boot: int
    boot_ms: int
    run_dir: Path
    local: str
    server: Mapping[str, Any]  # [server]
    shards: Mapping[str, int]  # of each model
    security: Mapping[str, str] | None  # [security]

    def to_json(self) -> dict[str, Any]:
        """As a line has it."""
        names = ("node", "boot", "boot_ms", "local", "server", "shards", "security")
        return {name: getattr(self, name) for name in names} | {"run_dir": str(self.run_dir)}

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "Begin":
        """Of a line."""
        return cls(**{**said, "run_dir": Path(said["run_dir"])})


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Who does not have all that our node has of a model yet, and who is silent; `refused`: why that cannot be said now."""

    lagging: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    refused: str = ""


class NodeChannel:
    """The server's end.

    Args:
        channel: to the node.
        on_lives: called on the event loop, with the lives for each model.
        on_taken_back: the same, with the name of a served model that was taken back, and with it what is trained of it.
    """

    def __init__(
        self,
        channel: Channel,
        on_lives: Callable[[Mapping[str, tuple[NodeLife, ...]]], None],
        on_taken_back: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._on_lives = on_lives
        self._on_taken_back = on_taken_back
        self._asked: dict[int, asyncio.Future[CaughtUp]] = {}
        self._numbers = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen."""

        def hear(said: Mapping[str, Any]) -> None:
            loop.call_soon_threadsafe(self._hear, said)

        self._channel.listen(hear)

    def _hear(self, said: Mapping[str, Any]) -> None:
        match said:
            case {"lives": dict(models)}:
                self._on_lives({name: tuple(_life_of(one) for one in lives) for name, lives in models.items()})
            case {"taken_back": list(models)}:
                for name in models:
                    self._on_taken_back(name)
            case {"caught_up": int(number), "lagging": lagging, "silent": silent, "refused": refused}:
                asked = self._asked.pop(number, None)
                if asked is not None and not asked.done():
                    asked.set_result(CaughtUp(tuple(lagging), tuple(silent), refused))

    async def caught_up(self, model: str) -> CaughtUp:
        """Whether the others have all that our node has of a model; waits a moment for it."""
        self._numbers += 1
        number = self._numbers
        self._asked[number] = asyncio.get_running_loop().create_future()
        self._channel.say(ask=number, model=model)
        return await self._asked[number]

    def tell(self, state: Mapping[str, Any]) -> None:
        """How the server is."""
        self._channel.say(state=state)


def _life_of(said: Mapping[str, Any]) -> NodeLife:
    return NodeLife(said["node"], said["boot_ms"], said["boot"], frozenset(said["holds"]), said["expelled"], said["gone"])
