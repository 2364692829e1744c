"""The server process: everything of `ekko.train.server` put together, from its start by a node to its end.

It ends cleanly on SIGTERM: no request is taken any more, what is under way has a moment to be answered. It ends at once when
its node does; whatever it was at, the process that the node starts next puts it right.
"""

import asyncio
import contextlib
import secrets
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from ekko.companions.channel import Channel
from ekko.config.sections import ServerSection
from ekko.errors import NodeFailed
from ekko.heap import keep_freed_memory
from ekko.logs import configure_logs
from ekko.model import training_name
from ekko.security import WATCH_S, NodeKeys
from ekko.store import warm
from ekko.train.server import wire as w
from ekko.train.server.channel import Begin, NodeChannel
from ekko.train.server.endpoint import Endpoint, addresses_of
from ekko.train.server.events import NodeLife
from ekko.train.server.schema import trained_model
from ekko.train.server.shell import ModelShell

STATE_S: Final = 0.5
DRAIN_S_MAX: Final = 2.0
REFUSALS_MAX: Final = 64

log = structlog.get_logger(__name__)


class ServerProcess:
    """One process, from its configuration to its end. Use: `await ServerProcess(begin, channel).run()`."""

    def __init__(self, begin: Begin, channel: Channel) -> None:
        self._begin = begin
        self._section = ServerSection(**begin.server)
        endpoints = {**self._section.peers, begin.node: self._section.endpoint}
        self._endpoints = dict(sorted(endpoints.items()))
        self._keys = self._open_keys()
        self._endpoint = Endpoint(self._section.listen, self, self._keys)
        self._channel = NodeChannel(channel, self._on_lives, self._on_taken_back)
        self._shells: dict[str, ModelShell] = {}
        self._lives: dict[str, tuple[NodeLife, ...]] = {}
        self._told = asyncio.Event()  # what the node knows of the others
        self._end = asyncio.Event()
        self._failure: BaseException | None = None
        self._refusals: set[str] = set()  # those that were logged

    def _open_keys(self) -> NodeKeys | None:
        if (security := self._begin.security) is None:
            return None
        of = addresses_of(self._endpoints).get
        return NodeKeys(self._begin.node, Path(security["key_file"]), Path(security["allow"]), of)

    async def run(self) -> None:
        """Serve until told to stop.

        Raises:
            EkkoError: the endpoint cannot be bound, or the node is not as this process expects it.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        self._channel.start(loop)
        await self._told.wait()
        begin = self._begin
        for name, section in self._section.models.items():
            if not self._lives.get(name):  # the node itself is always among them
                log.error(
                    "server_model_was_dropped", model=name, remedy=f"remove [server.models.{name}] from the configuration"
                )
                continue
            self._shells[name] = ModelShell(
                trained_model(name, section, begin.shards[name]),
                # A nonce for each model: a release names the life that it is for, and no model.
                w.ServerLife(begin.node, begin.boot_ms, begin.boot, secrets.randbits(63) | 1),
                self._endpoints,
                spares=self._section.ack == "spares",
                run_dir=begin.run_dir,
                local=begin.local,
                endpoint=self._endpoint,
                channel=self._channel,
                fail=self._fail,
            )
        self._hand_out_lives()
        self._endpoint.open()
        log.info("server_listening", address=self._section.listen, models=list(self._shells))
        tasks = [loop.create_task(shell.begin()) for shell in self._shells.values()]
        tasks.append(loop.create_task(self._tell()))
        if self._keys is not None:
            tasks.append(loop.create_task(self._watch_keys(self._keys)))
        for task in tasks:
            task.add_done_callback(self._on_done)
        await self._end.wait()
        if self._failure is None:
            await self._drain()
        for task in tasks:
            task.cancel()
        for shell in self._shells.values():
            shell.close()
        if self._failure is not None:
            raise self._failure
        self._endpoint.close()
        log.info("server_stopped")

    async def _drain(self) -> None:
        """Let what is under way be answered."""
        self._endpoint.shut()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S_MAX):
                for shell in self._shells.values():
                    await shell.drained()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._end.set()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    # --- what comes

    def _on_lives(self, lives: Mapping[str, tuple[NodeLife, ...]]) -> None:
        self._lives.update(lives)
        self._told.set()
        if dropped := [name for name in self._shells if not self._lives.get(name)]:
            # The process after this one serves the others; to let go of this one's memory all who use it have to end.
            self._fail(
                NodeFailed(f"model {dropped[0]!r}, or {training_name(dropped[0])!r}, was dropped: it is trained no more")
            )
        self._hand_out_lives()

    def _on_taken_back(self, model: str) -> None:
        if (shell := self._shells.get(model)) is not None:  # else it begins only now, and compares what it finds
            log.info("server_was_taken_back", model=model)
            shell.on_taken_back()

    def _hand_out_lives(self) -> None:
        for name, shell in self._shells.items():
            shell.on_lives(tuple(one for one in self._lives.get(name, ()) if one.node in self._endpoints))

    def on_request(self, ask: int, request: w.Request) -> None:
        """See `ekko.train.server.endpoint.Handler`."""
        shell = self._shells.get(request.model)
        if shell is None:
            known = ", ".join(map(repr, self._shells)) or "nothing"
            reason = f"the server beside node {self._begin.node!r} does not train model {request.model!r}: it trains {known}"
            self._endpoint.answer(ask, w.Failed(w.SETTINGS, reason))
            return
        shell.on_request(ask, request)

    def on_answer(self, answer: w.Answer) -> None:
        """See `ekko.train.server.endpoint.Handler`."""
        match answer:
            case w.Released(_, asker):
                for shell in self._shells.values():
                    if shell.own == asker:
                        shell.on_answer(answer)
            case w.Failed(kind, reason) if kind != w.BUSY and reason not in self._refusals:
                if len(self._refusals) < REFUSALS_MAX:  # it is asked again twice a second
                    self._refusals.add(reason)
                log.warning("server_refused", reason=reason)

    # --- what is told

    async def _tell(self) -> None:
        while True:
            state = {
                "endpoint": self._section.endpoint,
                "waiting": self._endpoint.waiting,
                "malformed": self._endpoint.malformed,
                "strangers": self._endpoint.transport.strangers,
                "models": {name: shell.picture() for name, shell in self._shells.items()},
            }
            self._channel.tell(state)
            await asyncio.sleep(STATE_S)

    async def _watch_keys(self, keys: NodeKeys) -> None:
        """Put changed key files into use, as the node does."""
        while True:
            await asyncio.sleep(WATCH_S)
            change = keys.adopt(await asyncio.to_thread(keys.look))
            if change.renewed or change.removed:
                self._endpoint.keys_changed()


def serve(channel: Channel) -> None:
    """All of the process; for `ekko.companions.channel.run`."""
    begin = Begin.of_json(channel.read_begin())
    configure_logs(node=begin.node, part="server")
    keep_freed_memory()
    warm()
    import uvloop

    uvloop.run(ServerProcess(begin, channel).run())
