"""One node: its life cycle. What it consists of is in `ekko.node`.

Everything runs on one event loop in one thread: the protocol machine behind its runtime, the local endpoint, the HTTP server.
The store and the machine are touched by that thread only, so nothing here needs a lock, and nothing may take long.

The order of a start is the order in which things can go wrong cheaply: lock, ports, kernels, store, sockets. Cancelling
`Node.run` is the only way to stop.
"""

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from ekko.config import NodeConfig
from ekko.device.control import retire
from ekko.errors import ConfigError, EkkoError, NodeFailed
from ekko.heap import keep_freed_memory
from ekko.http import HttpServer
from ekko.loading import Loading
from ekko.local import Failed
from ekko.node.answers import Answers
from ekko.node.delaying import check_role, open_delayed
from ekko.node.devices import devices_of, open_configured
from ekko.node.life import Life
from ekko.node.opening import have_configured_models, open_store
from ekko.node.parts import LocalEvent, Parts, make_parts
from ekko.node.server import TrainingServer
from ekko.node.sinks import NodeSinks, check_sinks
from ekko.priority.shares import Shares
from ekko.rundir import locked, write_endpoint
from ekko.security import WATCH_S, NodeKeys
from ekko.snapshots.service import SnapshotPicture, SnapshotService, SnapshotSettings
from ekko.snapshots.take import Plan
from ekko.store import Store, warm
from ekko.version import __version__
from p2p.errors import LocalProtocolError
from p2p.runtime import NodeExpelled, NodeStopped, Runtime, read_clock
from p2p.transport.zmq import ZmqTransport

FOLD_S = 2.0  # how far what `ekko hot` says may be behind the readers
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
MEMORY_DIR = Path("/dev/shm")  # noqa: S108 - the tmpfs that Linux has for shared memory

log = structlog.get_logger(__name__)


class Node:
    """A node, from its configuration to its end. Use: `await Node(config).run()`."""

    def __init__(self, config: NodeConfig, *, memory_dir: Path = MEMORY_DIR) -> None:
        self.config = config
        self._memory_dir = memory_dir
        self._life = Life()
        self._snapshots = _snapshot_service(config)
        self._loads = Loading(
            lambda request, plan: self._parts.publishing.open_to_load(request, plan),
            lambda step: self._parts.publishing.publish_loaded(step),
        )
        self._answers = Answers(config, memory_dir, lambda: self._life, self._snapshots, self._loads, self._submit)
        self._restores = True
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._failure: BaseException | None = None

    @property
    def _parts(self) -> Parts:
        assert self._life.parts is not None, "only when there is a store"
        return self._life.parts

    # --- lifecycle

    async def run(self) -> None:
        """Serve until cancelled, or told to stop by SIGTERM or SIGINT.

        Raises:
            ConfigError: a port or the run_dir is taken, or a model of the configuration contradicts what is stored.
            StoreError: shared memory cannot be used.
            NodeFailed: an invariant is in danger; the reason says what to do.
        """
        self._task = asyncio.current_task()
        with locked(self.config.node.run_dir), self._signals():
            check_role(self.config.node)
            check_sinks(self.config)
            while await self._live():
                self._life = Life()

    async def _live(self) -> bool:
        """One life, to its end; True when the node was expelled, has dropped its rows, and is to begin another one."""
        http = HttpServer(self._answers, *self.config.http_address)
        try:
            await self._serve(http)
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            if not self._stopping:
                raise
        except BaseExceptionGroup as group:
            error = _first_of(group)
            if not isinstance(error, NodeExpelled) or self._life.parts is None:
                raise error from None
            self._life.parts.destroy()
            self._life.parts = None
            self._restores = False  # what it was told to drop is in its snapshots, too
            return True
        finally:
            http.close()
            if self._life.parts is not None:
                self._life.parts.close()
            log.info("node_stopped")
        return False

    async def _serve(self, http: HttpServer) -> None:
        try:
            await self._serve_until_cancelled(http)
        finally:
            if self._life.devices is not None:
                self._life.devices.close()  # before the store that it reads

    async def _serve_until_cancelled(self, http: HttpServer) -> None:
        node, life = self.config.node, self._life
        keep_freed_memory()
        log.info("node_starting", version=__version__, run_dir=str(node.run_dir), http=node.http)
        retire(node.run_dir)  # before anything is written that the caches of a daemon before this one do not have
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(http.serve())
            # Compiling takes a while when the cache is cold; /healthz answers meanwhile.
            await asyncio.to_thread(warm)
            life.preparing.remove("kernels")
            device = await asyncio.to_thread(open_configured, self.config)
            store = await self._open_store()
            delayed = await asyncio.to_thread(open_delayed, self.config, store, self._memory_dir)
            life.parts = parts = make_parts(
                self.config, store, delayed, life.boot, life.boot_ms, self._answers.metrics, self._submit
            )
            life.devices = devices_of(self.config, device, parts.served)
            parts.operations.settle()
            life.preparing.remove("store")
            if self._snapshots is not None:
                tasks.create_task(self._snapshots.run())
            tasks.create_task(self._run_protocol(parts.runtime))
            await parts.runtime.started.wait()
            if parts.keys is not None:
                tasks.create_task(self._watch_keys(parts.keys, parts.transport))
            tasks.create_task(parts.health.run())
            tasks.create_task(parts.rollbacks.run())
            tasks.create_task(self._fold_heat(parts.served, parts.shares))
            if parts.delaying is not None:
                tasks.create_task(parts.delaying.run())
            if life.devices is not None:
                tasks.create_task(life.devices.run())
            parts.endpoint.start()
            write_endpoint(node.run_dir, node.local, node.access)
            life.preparing.remove("sockets")
            if self.config.server is not None:
                where = parts.store, parts.machine, parts.operations
                life.server = TrainingServer(self.config, *where, lambda: not self._answers.waiting_for())
                tasks.create_task(life.server.run())
            if self.config.sinks:
                life.sinks = NodeSinks(self.config, parts.served)
                tasks.create_task(life.sinks.run())
            # Half a million objects of the libraries, which the collector would visit again and again while batches wait.
            gc.collect()
            gc.freeze()
            log.info("node_listening", peers=parts.transport.address, local=node.local)
            try:
                await asyncio.Event().wait()  # until cancelled
            finally:
                # First: they need all the rest.
                await asyncio.gather(*(one.stop() for one in (life.server, life.sinks) if one is not None))
                self._loads.close()
                # Before the protocol stops: a step that is answered must be on its way.
                parts.endpoint.close()

    async def _open_store(self) -> Store:
        life = self._life

        def tell(progress: str) -> None:
            life.loading = progress

        try:
            store = await open_store(self.config, self._memory_dir, self._snapshots if self._restores else None, tell)
        finally:
            life.loading = ""
        have_configured_models(self.config, store)
        log.info("store_open", resumed=store.resumed, models=list(store.models))
        return store

    async def _run_protocol(self, runtime: Runtime) -> None:
        try:
            await runtime.run()
        except NodeExpelled:
            raise
        except NodeStopped as error:
            raise NodeFailed(str(error)) from None
        except OSError as error:
            raise ConfigError(
                f"node.peers: {error.strerror or error}: stop what listens there, or choose another port"
            ) from None

    async def _watch_keys(self, keys: NodeKeys, transport: ZmqTransport) -> None:
        """Put changed key files into use."""
        while True:
            await asyncio.sleep(WATCH_S)
            change = keys.adopt(await asyncio.to_thread(keys.look))
            if not change:
                continue
            for problem in change.problems:
                log.warning("key_problem", problem=problem)
            log.info("keys_changed", own_renewed=change.renewed, added=change.added, removed=change.removed)
            try:
                await transport.check_keys()
            except OSError as error:
                raise NodeFailed(f"node.peers: {error.strerror or error}") from None

    async def _fold_heat(self, store: Store, shares: Shares) -> None:
        """Take over what readers counted, table by table: a millisecond of the loop's time each."""
        half_life_ms = self.config.node.hot_half_life_s * 1000
        while True:
            await asyncio.sleep(FOLD_S)
            for model in list(store.models.values()):
                for name, heat in list(model.heat.items()):
                    asked = heat.fold(time.monotonic_ns() // 1_000_000, half_life_ms)
                    model.fetching.note_asked(model.spec.tables[name].id, asked, time.monotonic())
                    await asyncio.sleep(0)
            shares.look(read_clock())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("node_stopping", signal=number.name)
        self._stop(None)

    def _stop(self, failure: BaseException | None) -> None:
        if not self._stopping and self._task is not None:
            self._stopping, self._failure = True, failure
            self._task.cancel()

    def _submit(self, event: LocalEvent) -> Failed | None:
        """Hand an event to the protocol; the answer comes as an effect, often before this returns."""
        try:
            self._parts.runtime.submit(event)
        except LocalProtocolError as error:
            return Failed("publish", str(error))
        except Exception as error:  # the protocol may have stopped half-way through
            log.error("local_request_failed", error=str(error), exc_info=not isinstance(error, EkkoError))
            self._stop(error)
            return Failed("publish", f"the node failed and stops: {error}")
        return None


def _snapshot_service(config: NodeConfig) -> SnapshotService | None:
    if (section := config.snapshots) is None:
        return None
    own = f"{section.url.rstrip('/')}/{config.node.id}"  # several nodes may be given one place
    settings = SnapshotSettings(own, section.every, Plan(section.full_every, section.keep), section.seed)
    return SnapshotService(settings, config.node.run_dir, config.node.id, _log_snapshot)


def _log_snapshot(picture: SnapshotPicture) -> None:
    if picture.error:
        log.warning("snapshot_failed", reason=picture.error)
    else:
        log.info("snapshot_written", snapshot=picture.name, bytes=picture.bytes, full=picture.full, seconds=picture.seconds)


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended the node: the first one that a person can act on, else the first."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending = [*error.exceptions, *pending]
        else:
            leaves.append(error)
    return next((error for error in leaves if isinstance(error, EkkoError)), leaves[0])
