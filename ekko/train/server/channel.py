"""What a node and the server beside it say to each other, over the server's standard input and output: lines of JSON.

To the server: first `begin`, who it is; then `lives` whenever they change, what the node knows of the nodes of other servers;
and `caught_up`, answers. From the server: `state`, twice a second, for whoever looks at the node; `ask`, a question whether the
others have all that the node has of a model; `error`, why it ends.

The node's end is `ekko.node.server`. Both are of one release: one starts the other.
"""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ekko.errors import EkkoError
from ekko.train.server.events import NodeLife

LINE_BYTES_MAX: Final = 1 << 20
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
    """The server's end. Ends the process when its node is gone.

    Args:
        on_lives: called on the event loop, with the lives for each model.
    """

    def __init__(self, on_lives: Callable[[Mapping[str, tuple[NodeLife, ...]]], None]) -> None:
        self._on_lives = on_lives
        self._asked: dict[int, asyncio.Future[CaughtUp]] = {}
        self._numbers = 0
        self._writing = threading.Lock()

    @staticmethod
    def read_begin() -> Begin:
        """The first line. Blocks.

        Raises:
            EkkoError: this was not started by a node.
        """
        line = sys.stdin.buffer.readline(LINE_BYTES_MAX)
        try:
            return Begin.of_json(json.loads(line)["begin"])
        except (ValueError, KeyError, TypeError):
            raise EkkoError("this process is started by a node whose configuration has [server]: run `ekko node`") from None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen, in a thread: what holds up the loop must not keep this process alive without its node."""
        threading.Thread(target=self._listen, args=(loop,), name="node", daemon=True).start()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        while line := sys.stdin.buffer.readline(LINE_BYTES_MAX):
            loop.call_soon_threadsafe(self._hear, json.loads(line))
        os._exit(1)  # the node is gone, and nothing may be written without it

    def _hear(self, said: Mapping[str, Any]) -> None:
        match said:
            case {"lives": dict(models)}:
                self._on_lives({name: tuple(_life_of(one) for one in lives) for name, lives in models.items()})
            case {"caught_up": int(number), "lagging": lagging, "silent": silent, "refused": refused}:
                asked = self._asked.pop(number, None)
                if asked is not None and not asked.done():
                    asked.set_result(CaughtUp(tuple(lagging), tuple(silent), refused))

    async def caught_up(self, model: str) -> CaughtUp:
        """Whether the others have all that our node has of a model; waits a moment for it."""
        self._numbers += 1
        number = self._numbers
        self._asked[number] = asyncio.get_running_loop().create_future()
        self.say(ask=number, model=model)
        return await self._asked[number]

    def say(self, **what: Any) -> None:
        """One line to the node."""
        with self._writing:
            sys.stdout.write(json.dumps(what) + "\n")
            sys.stdout.flush()


def _life_of(said: Mapping[str, Any]) -> NodeLife:
    return NodeLife(said["node"], said["boot_ms"], said["boot"], frozenset(said["holds"]), said["expelled"], said["gone"])
