"""One node: wiring and lifecycle.

Everything runs on one event loop in one thread: the protocol machine behind its runtime, the local endpoint, the HTTP server.
The store and the machine are touched by that thread only, so nothing here needs a lock, and nothing may take long.

The order of a start is the order in which things can go wrong cheaply: lock, ports, kernels, store, sockets. Cancelling
`Node.run` is the only way to stop.
"""

import asyncio
import contextlib
import gc
import random
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import structlog
import xxhash

from ekko.config import NodeConfig
from ekko.endpoint import REQUESTS_PENDING_MAX, LocalEndpoint
from ekko.errors import ConfigError, EkkoError, ModelError, NodeFailed, PublishError, StoreError
from ekko.heap import keep_freed_memory
from ekko.hot_report import hot_report
from ekko.http import HttpServer
from ekko.loading import Loading, LoadRequest
from ekko.local import REOPEN, Answer, Failed, Open, Opened, Ping, Pong, PublishStep, Request, Stored, Wait, Waited
from ekko.metrics import Metrics
from ekko.model import CODEC_DEFAULT, DENSE_DIM, DENSE_TABLE, SHARDS_DEFAULT, ModelSpec, TableSpec, table_id
from ekko.operations import Operations
from ekko.rundir import FileLedger, locked
from ekko.security import WATCH_S, NodeKeys
from ekko.snapshots.files import LoadPlan
from ekko.snapshots.folders import Folder, open_folder
from ekko.snapshots.load import Wanted, open_or_restore
from ekko.snapshots.service import SnapshotPicture, SnapshotService, SnapshotSettings
from ekko.snapshots.take import Plan
from ekko.status import ModelPicture, NodePicture, TablePicture
from ekko.store import Store, warm
from ekko.store.capacity import Capacity, header_bytes
from ekko.store.hot import HeatStats
from ekko.store.leftovers import LeftoversWatch
from ekko.store.manifest import kernel_boot_id
from ekko.store.model_store import ModelStore
from ekko.store.recent import CacheStats
from ekko.version import __version__
from p2p import messages as m
from p2p.compression import Mode
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.machine import Machine, MachineOptions
from p2p.membership import MEMBERS_MAX
from p2p.runtime import NodeExpelled, NodeStopped, Runtime, no_delay
from p2p.status import KeyspaceStatus, QueueStatus
from p2p.transport.zmq import ZmqTransport

# A model that a publisher brings begins with room for this many rows; slabs grow.
FOLD_S = 2.0  # how far what `ekko hot` says may be behind the readers
CAPACITY_ROWS_GUESS = 65_536
# Asked for at every dial; a whole cluster is dialled at once.
NODES_KNOWN_MS = 200
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Requests of tools are answered at once, so that one number is enough; those of the local endpoint count from 0.
TOOL_REQUEST = -1
LOAD_REQUEST = -2  # a step of `ekko load`, one at a time
MEMORY_DIR = Path("/dev/shm")  # noqa: S108 - the tmpfs that Linux has for shared memory

log = structlog.get_logger(__name__)


class Node:
    """A node, from its configuration to its end. Use: `await Node(config).run()`."""

    def __init__(self, config: NodeConfig, *, memory_dir: Path = MEMORY_DIR) -> None:
        self.config = config
        self._memory_dir = memory_dir
        self._started_s = time.monotonic()
        self._machine_hash = machine_hash()
        self._metrics = Metrics(self.picture, self._machine_hash)
        self._leftovers = LeftoversWatch(memory_dir)
        self._full = 0  # steps that were refused, for want of room in their model
        self._begin_life()
        self._tool_answer: m.Expelled | m.Refused | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._failure: BaseException | None = None
        self._nodes: dict[str, str] = {}  # address -> node
        self._nodes_until_ms = 0
        self._regions: dict[str, str] = {}  # address -> region
        self._parts: _Parts | None = None
        self._snapshots: SnapshotService | None = None
        if (section := config.snapshots) is not None:
            own = f"{section.url.rstrip('/')}/{config.node.id}"  # several nodes may be given one place
            settings = SnapshotSettings(own, section.every, Plan(section.full_every, section.keep), section.seed)
            self._snapshots = SnapshotService(settings, config.node.run_dir, config.node.id, _log_snapshot)
        self._loads = Loading(self._open_to_load, self._publish_loaded)
        self._load_answer: asyncio.Future[int] | None = None
        self._restores = True
        self._loading = ""  # how far a snapshot is loaded

    def _begin_life(self) -> None:
        """What is new in each life of the node; more than one where it is expelled and starts over."""
        self._boot = secrets.randbits(64) | 1
        self._boot_ms = time.time_ns() // 1_000_000
        self._endpoint = LocalEndpoint(self.config.node.local, self)
        self._preparing = ["kernels", "store", "sockets"]
        self._caught_up = False

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
            while await self._live():
                self._begin_life()

    async def _live(self) -> bool:
        """One life, to its end; True when the node was expelled, has dropped its rows, and is to begin another one."""
        http = HttpServer(self, *self.config.http_address)
        try:
            await self._serve(http)
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            if not self._stopping:
                raise
        except BaseExceptionGroup as group:
            error = _first_of(group)
            if not isinstance(error, NodeExpelled) or self._parts is None:
                raise error from None
            self._parts.operations.close()
            self._parts.store.destroy()
            self._parts = None
            self._restores = False  # what it was told to drop is in its snapshots, too
            return True
        finally:
            http.close()
            if self._parts is not None:
                self._parts.operations.close()
                self._parts.store.close()
            log.info("node_stopped")
        return False

    async def _serve(self, http: HttpServer) -> None:
        node = self.config.node
        keep_freed_memory()
        log.info("node_starting", version=__version__, run_dir=str(node.run_dir), http=node.http)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(http.serve())
            # Compiling takes a while when the cache is cold; /healthz answers meanwhile.
            await asyncio.to_thread(warm)
            self._preparing.remove("kernels")
            self._parts = parts = self._make_parts(await self._open_store())
            parts.operations.settle()
            self._preparing.remove("store")
            if self._snapshots is not None:
                tasks.create_task(self._snapshots.run())
            tasks.create_task(self._run_protocol(parts.runtime))
            await parts.runtime.started.wait()
            if parts.keys is not None:
                tasks.create_task(self._watch_keys(parts.keys, parts.transport))
            tasks.create_task(self._fold_heat(parts.store))
            self._endpoint.start()
            self._preparing.remove("sockets")
            # Half a million objects of the libraries, which the collector would visit again and again while batches wait.
            gc.collect()
            gc.freeze()
            log.info("node_listening", peers=parts.transport.address, local=node.local)
            try:
                await asyncio.Event().wait()  # until cancelled
            finally:
                self._loads.close()
                # Before the protocol stops: a step that is answered must be on its way.
                self._endpoint.close()

    def _make_parts(self, store: Store) -> "_Parts":
        node = self.config.node
        for name, model in self.config.models.items():
            if model.capacity_bytes is not None:
                store.limit(name, Capacity(model.capacity_bytes, model.evict if model.when_full == "evict" else None))
            if name not in store.models and name in store.registers.dropped:
                log.warning("model_was_dropped", model=name, remedy=f"remove [models.{name}] from the configuration")
                continue
            try:
                held = store.add_model(store.current(model.spec(name)), model.capacity_rows, model.held)
            except ModelError as error:
                if name in store.registers.dropped:  # what is configured was dropped, and another one has its name
                    log.warning("model_was_dropped", model=name, remedy=f"change [models.{name}]", reason=str(error))
                    continue
                raise ConfigError(f"models.{name}: {error}: change the configuration, or remove {node.run_dir}") from None
            if model.capacity_bytes is not None:
                if model.capacity_bytes < (least := header_bytes(held)):
                    raise ConfigError(
                        f"models.{name}.capacity_bytes: {model.capacity_bytes} bytes, and {held.shards} shards take {least} "
                        "without any row: allow the model more, or give it fewer shards"
                    )
                if held.memory_bytes > model.capacity_bytes:
                    log.warning("capacity_exceeded", model=name, bytes=held.memory_bytes, capacity_bytes=model.capacity_bytes)
        log.info("store_open", resumed=store.resumed, models=list(store.models))
        options = MachineOptions(
            node.id,
            self._boot,
            self._boot_ms,
            node.region,
            node.role,
            tuple(node.seeds),
            self._machine_hash,
            expel_after_ms=int(node.expel_after_s * 1000),
        )
        try:
            machine = Machine(options, store, FileLedger(node.run_dir), random.Random(secrets.randbits(64)))
        except LocalProtocolError as error:
            raise StoreError(f"{node.run_dir}: {error}") from None
        keys = None
        if (security := self.config.security) is not None:
            keys = NodeKeys(node.id, security.key_file, security.allow, self._node_at)
        transport = ZmqTransport(node.peers, advertise=node.advertise, keys=keys)
        runtime = Runtime(
            machine,
            transport,
            on_effect=self._on_effect,
            delay_s=self._delay_s if self.config.links else no_delay,  # asked at each send
            compression=Mode(node.compression),
            crosses=self._crosses,
        )
        oldest = machine.protocol_min_known
        return _Parts(store, machine, transport, runtime, keys, Operations(node.id, store, self._submit_operation, oldest))

    async def _open_store(self) -> Store:
        """The store as it was left, or as a snapshot has it, without the partitions that are not to be held any more."""
        stop = threading.Event()
        try:
            store = await asyncio.to_thread(self._attach_or_restore, stop)
        finally:
            stop.set()  # a thread cannot be cancelled; it looks at this
            self._loading = ""
        hold = {}
        for name, model in self.config.models.items():
            left = store.models.get(name)
            if left is not None and left.spec.partitions == model.partitions:  # otherwise it is refused in a moment
                hold[name] = model.held
                if dropped := sorted(set(left.hold) - set(model.held)):
                    log.warning("partitions_dropped", model=name, partitions=dropped)
        return store.narrowed(hold)

    def _attach_or_restore(self, stop: threading.Event) -> Store:
        """In a thread: 100 GB take minutes, and /healthz answers meanwhile."""
        config, run_dir, access = self.config, self.config.node.run_dir, self.config.node.access
        if self._snapshots is None or not self._restores:
            return Store.open(run_dir, memory_dir=self._memory_dir, access=access)
        places = [self._snapshots.picture.url]
        if config.snapshots is not None and config.snapshots.seed is not None:
            places.append(config.snapshots.seed)
        folders: list[Folder] = [open_folder(url) for url in places]
        specs = {name: model.spec(name) for name, model in config.models.items()}
        wanted = Wanted(specs, {name: model.held for name, model in config.models.items()})

        def progress(done: int, total: int) -> None:
            self._loading = f"a snapshot: {done * 100 // max(1, total)} % of {total} bytes are loaded"

        begin = time.monotonic()
        restored = open_or_restore(
            run_dir, folders, wanted, memory_dir=self._memory_dir, access=access, progress=progress, stop=stop
        )
        for reason in restored.refused:
            log.warning("snapshot_refused", reason=reason)
        if restored.snapshot is not None:
            seconds = round(time.monotonic() - begin, 3)
            log.info("snapshot_restored", snapshot=restored.snapshot, url=restored.url, bytes=restored.bytes, seconds=seconds)
        self._snapshots.restored(restored.snapshot or "", restored.created_ms, tuple(restored.refused))
        return restored.store

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

    async def _fold_heat(self, store: Store) -> None:
        """Take over what readers counted, table by table: a millisecond of the loop's time each."""
        half_life_ms = self.config.node.hot_half_life_s * 1000
        while True:
            await asyncio.sleep(FOLD_S)
            for model in list(store.models.values()):
                for heat in list(model.heat.values()):
                    heat.fold(time.monotonic_ns() // 1_000_000, half_life_ms)
                    await asyncio.sleep(0)

    def _node_at(self, address: str) -> str | None:
        """The node that peers dial at `address`, where it is known; at most a little out of date."""
        if self._parts is None:
            return None
        now = _now()
        if now.monotonic_ms >= self._nodes_until_ms:
            peers = self._parts.machine.status(now).peers
            self._nodes = {peer.address: peer.node for peer in peers if peer.address}
            self._nodes_until_ms = now.monotonic_ms + NODES_KNOWN_MS
        return self._nodes.get(address)

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

    # --- what the protocol wants done

    def _on_effect(self, effect: m.Effect) -> None:
        match effect:
            case m.BatchApplied():
                self._metrics.on_applied(effect, time.monotonic_ns(), time.time_ns() // 1_000_000)
            case m.Published(request, stamp) if request == LOAD_REQUEST:
                self._answer_load(stamp)
            case m.Published(request, stamp):
                self._endpoint.answer(request, Stored(stamp))
            case m.Refused() | m.WaitEnded() if self._parts is not None and self._parts.operations.on_answer(effect):
                pass
            case m.Refused(request) if request == TOOL_REQUEST:
                self._tool_answer = effect
            case m.Refused(request, reason) if request == LOAD_REQUEST:
                self._answer_load(PublishError(reason))
            case m.Refused(request, reason):
                self._endpoint.answer(request, Failed("publish", reason))
            case m.WaitEnded(request, lagging, silent):
                self._endpoint.answer(request, Waited(lagging, silent))
            case m.Note(name, fields, alarm):
                (log.warning if alarm else log.info)(name, **self._readable(fields))
            case m.Expelled():
                self._tool_answer = effect
            case m.Fatal(reason):
                log.error("node_fatal", reason=reason)
            case m.StartOver(reason, rows_lost):
                log.error("node_starts_over", reason=reason, rows_lost=rows_lost)
            case m.Send() | m.Dial() | m.Forget() | m.Continue() | m.Unwanted():
                raise AssertionError(f"the runtime carries out {effect}")
            case _:
                assert_never(effect)

    def _readable(self, fields: tuple[tuple[str, object], ...]) -> dict[str, object]:
        """A note's fields with model names for keyspace numbers."""
        readable = dict(fields)
        if "keyspace" in readable and self._parts is not None:
            number = readable.pop("keyspace")
            readable["model"] = next(
                (name for name, model in self._parts.store.models.items() if number in (model.spec.id, *model.spec.keyspaces)),
                number,
            )
        return readable

    def _region_of(self, address: str) -> str | None:
        """The region of a peer; None until it is known. Asked at each send."""
        region = self._regions.get(address)
        if region is None and self._parts is not None and (region := self._parts.machine.region_of(address)) is not None:
            if len(self._regions) >= MEMBERS_MAX:
                self._regions.clear()
            self._regions[address] = region
        return region

    def _delay_s(self, address: str) -> float:
        """Emulated one-way delay towards a peer; none until its region is known."""
        region = self._region_of(address)
        return 0.0 if region is None else self.config.delay_s(self.config.node.region, region)

    def _crosses(self, address: str) -> bool:
        """Whether a peer is known to be in another region."""
        return self._region_of(address) not in (None, self.config.node.region)

    # --- requests of publishers and tools

    def handle_request(self, number: int, request: Request) -> Answer | None:
        """See `ekko.endpoint.Handler`."""
        assert self._parts is not None, "the endpoint starts after the parts"
        match request:
            case Ping():
                return Pong(self.config.node.id)
            case Open():
                return self._open(self._parts, request)
            case PublishStep():
                return self._publish(self._parts, number, request)
            case Wait(model, stamp, scope, timeout_ms):
                held = self._parts.store.models.get(model)
                if held is None:
                    raise ModelError(self._unknown(self._parts, model))
                return self._submit(m.WaitRequested(number, held.spec.id, stamp, scope, timeout_ms))
            case _:
                assert_never(request)

    def _open(self, parts: "_Parts", request: Open) -> Opened:
        self._check_may_publish()
        held = parts.store.models.get(request.model)
        # Readers name aliases, publishers name models: a trainer of the old generation that is started again would otherwise
        # write into the new one.
        if held is None and (aliased := parts.store.registers.resolve(request.model)) is not None:
            raise ModelError(
                f"{request.model!r} is an alias, now of model {aliased.name!r}: publish to a model by its own name, so that "
                "what is written does not depend on when the alias is switched"
            )
        if held is None and request.tables is None:
            raise ModelError(f"{self._unknown(parts, request.model)}; give its tables to create it")
        shards = request.shards or (SHARDS_DEFAULT if held is None else held.shards)
        codec = request.codec or (CODEC_DEFAULT if held is None else held.spec.codec)
        known_ttls = {} if held is None else {table.name: table.ttl_s for table in held.spec.tables.values()}
        tables = {
            name: TableSpec(name, dim, codec, known_ttls.get(name, 0) if ttl_s is None else ttl_s)
            for name, dim, ttl_s in request.tables or ()
        }
        partitions = 1 if held is None else held.spec.partitions
        wanted = parts.store.current(ModelSpec(request.model, shards, tables, partitions=partitions, codec=codec))
        if held is None or not tables.keys() <= held.spec.tables.keys():
            self._grow_schema(parts, wanted)
        else:  # refuses what contradicts it
            parts.store.add_model(wanted, asked=False)
        model = parts.store.models[request.model]
        dims = {table.name: table.dim for table in model.spec.tables.values()}
        node, tensors = self.config.node, dict(model.spec.tensors)
        return Opened(node.id, node.region, model.shards, dims, tensors, model.last_stamp, model.spec.codec)

    def load(self, request: LoadRequest) -> dict[str, object]:
        """See `ekko.http.Source`."""
        if self._parts is None:
            raise EkkoError(f"node {self.config.node.id!r} is starting: ask again when it is ready")
        self._check_may_publish()
        before = asdict(self._loads.picture)
        self._loads.begin(request)
        return before

    def _open_to_load(self, request: LoadRequest, plan: LoadPlan | None) -> tuple[str, dict[str, int]]:
        """See `ekko.loading.Loading`."""
        assert self._parts is not None
        held = self._parts.store.models.get(request.model)
        codec = request.codec if held is None else held.spec.codec
        known = {} if held is None else dict(held.spec.tables)
        if plan is not None:
            new = {name: table for name, table in plan.table_specs(codec).items() if name not in known}
            if held is None or new:
                bare = ModelSpec(request.model, codec=codec) if held is None else held.spec.bare()
                self._grow_schema(self._parts, replace(bare, tables=new))
        return codec, {name: table.dim for name, table in known.items()}

    async def _publish_loaded(self, step: PublishStep) -> int:
        """See `ekko.loading.Loading`."""
        assert self._parts is not None
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._load_answer = answered
        failed = self._publish(self._parts, LOAD_REQUEST, step, quiet=True)
        if isinstance(failed, Failed):
            raise PublishError(failed.reason)
        return await answered

    def _answer_load(self, answer: int | PublishError) -> None:
        if self._load_answer is None or self._load_answer.done():
            return
        if isinstance(answer, int):
            self._load_answer.set_result(answer)
        else:
            self._load_answer.set_exception(answer)

    def _publish(self, parts: "_Parts", number: int, step: PublishStep, *, quiet: bool = False) -> Answer | None:
        """Check what would harm the store, then hand the step to the protocol.

        That keys are unique within a table is the publisher's part: of duplicates the store keeps the first.
        """
        self._check_may_publish()
        model = parts.store.models.get(step.model)
        if model is None and step.model in parts.store.registers.dropped:
            raise ModelError(f"{self._unknown(parts, step.model)}; make a new Publisher to begin one of this name anew")
        if model is None:
            return Failed(REOPEN, f"unknown model {step.model!r}")
        if step.codec != model.spec.codec:
            return Failed(REOPEN, f"rows in codec {step.codec!r} for model {step.model!r}, which has {model.spec.codec!r}")
        self._check_room(model, step)
        new = {tensor.name: tensor for tensor in step.tensors if model.spec.tensors.get(tensor.name) != tensor}
        if new:
            self._grow_schema(parts, replace(model.spec, tables={}, tensors=new))
        tables = [column.table for column in step.columns]
        if len(set(tables)) != len(tables):
            raise PublishError("a step names one table twice")
        known = {table.id for table in model.spec.tables.values()} | {table_id(DENSE_TABLE)}
        if not known.issuperset(tables):
            return Failed(REOPEN, f"unknown table of model {step.model!r}")
        try:
            model.check(step.columns)
        except RemoteProtocolError as error:
            raise ModelError(str(error)) from None
        self._check_held(model, step)
        return self._submit(m.PublishRequested(number, model.keyspace, step.columns, step.published_ns, quiet))

    def _check_room(self, model: ModelStore, step: PublishStep) -> None:
        try:
            model.check_step(step.columns)
        except PublishError as error:
            self._full += 1
            raise PublishError(f"node {self.config.node.id!r}: {error}") from None

    def _unknown(self, parts: "_Parts", model: str) -> str:
        known = ", ".join(map(repr, parts.store.models)) or "none"
        what = f"model {model!r} was dropped" if model in parts.store.registers.dropped else f"unknown model {model!r}"
        return f"{what} at node {self.config.node.id!r}: known: {known}"

    def _check_held(self, model: ModelStore, step: PublishStep) -> None:
        """A node holds what it writes (R22): otherwise nobody could repair what is lost on the way.

        Raises:
            PublishError: some rows belong to partitions that are not held here.
        """
        if model.holds_all:
            return
        for column in step.columns:
            missing = sorted(set(np.unique(model.partition_of(column.keys)).tolist()) - set(model.hold))
            if missing:
                table = next((name for name, spec in model.spec.tables.items() if spec.id == column.table), DENSE_TABLE)
                raise PublishError(
                    f"rows of table {table!r} belong to partitions {missing} of model {step.model!r}, of which node "
                    f"{self.config.node.id!r} holds {list(model.hold)}: publish them at a node that holds them, or add them to "
                    f"models.{step.model}.hold; nothing was published"
                )

    def _check_may_publish(self) -> None:
        node = self.config.node
        if node.role != "train":
            raise PublishError(f"node {node.id!r} has role {node.role!r}: publish to a node with role 'train'")

    def _grow_schema(self, parts: "_Parts", spec: ModelSpec) -> None:
        oldest = parts.machine.protocol_min(_now())
        if oldest < spec.since:
            raise ModelError(
                f"model {spec.name!r} has a codec, partitions or a ttl, which protocol version {oldest} does not know and "
                "some node still speaks: upgrade all nodes first (`ekko status` shows who)"
            )
        parts.store.add_model(spec, CAPACITY_ROWS_GUESS, asked=False)
        self._submit(m.SchemaChanged())

    def _submit(
        self, event: m.PublishRequested | m.WaitRequested | m.CaughtUpRequested | m.SchemaChanged | m.ExpelRequested
    ) -> Answer | None:
        """Hand an event to the protocol; the answer comes as an effect, often before this returns."""
        assert self._parts is not None
        try:
            self._parts.runtime.submit(event)
        except LocalProtocolError as error:
            return Failed("publish", str(error))
        except Exception as error:  # the protocol may have stopped half-way through
            log.error("local_request_failed", error=str(error), exc_info=not isinstance(error, EkkoError))
            self._stop(error)
            return Failed("publish", f"the node failed and stops: {error}")
        return None

    # --- what HTTP says

    def waiting_for(self) -> list[str]:
        """See `ekko.http.Source`."""
        waiting = [self._loading if part == "store" and self._loading else part for part in self._preparing]
        if not self._caught_up and self._parts is not None:
            # Once in a life: a model that comes later must not take a node that serves others out of service.
            self._caught_up = self._parts.machine.status(_now()).synced
            if not self._caught_up:
                waiting.append("the cluster: this node has not caught up with it yet")
        if self._parts is not None and (reason := self._parts.machine.ids_wanted):
            waiting.append(f"a writer id: {reason}")
        return waiting

    def status(self) -> dict[str, object]:
        """See `ekko.http.Source`."""
        picture = self.picture()
        return {"ready": False, "waiting_for": self.waiting_for()} if picture is None else picture.to_json()

    def expel(self, node: str) -> dict[str, object]:
        """See `ekko.http.Source`."""
        if self._parts is None:
            raise EkkoError(f"node {self.config.node.id!r} is starting: ask again when it is ready")
        failed = self._submit(m.ExpelRequested(TOOL_REQUEST, node))
        answer = self._take_tool_answer()
        if isinstance(answer, m.Expelled):
            return {"node": answer.node, "writers": answer.writers}
        reason = answer.reason if answer is not None else failed.reason if isinstance(failed, Failed) else "no answer"
        raise EkkoError(reason)

    def snapshot(self, kind: Literal["auto", "full"]) -> dict[str, object]:
        """See `ekko.http.Source`."""
        if self._snapshots is None:
            raise EkkoError(f"node {self.config.node.id!r} has no [snapshots] in its configuration: add url = ... there")
        if self._parts is None:
            raise EkkoError(f"node {self.config.node.id!r} is starting: ask again when it is ready")
        before = asdict(self._snapshots.picture)
        self._snapshots.ask(kind)
        return before

    async def alias(self, name: str, model: str | None, *, back: bool, remove: bool, force: bool) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return await self._operations().alias(name, model, back=back, remove=remove, force=force)

    def drop(self, model: str, *, force: bool) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return self._operations().drop(model, force=force)

    def _operations(self) -> Operations:
        if self._parts is None:
            raise EkkoError(f"node {self.config.node.id!r} is starting: ask again when it is ready")
        return self._parts.operations

    def _submit_operation(self, event: m.CaughtUpRequested | m.SchemaChanged) -> None:
        failed = self._submit(event)
        if isinstance(failed, Failed):
            raise EkkoError(failed.reason)

    def _take_tool_answer(self) -> m.Expelled | m.Refused | None:
        answer, self._tool_answer = self._tool_answer, None
        return answer

    def metrics_text(self) -> bytes:
        """See `ekko.http.Source`."""
        return self._metrics.text()

    def hot(self, model: str, table: str | None, count: int) -> dict[str, object]:
        """See `ekko.http.Source`."""
        if self._parts is None:
            raise EkkoError(f"node {self.config.node.id!r} is starting: ask again when it is ready")
        return hot_report(self._parts.store, model, table, count)

    def delays(self, since: int) -> dict[str, object]:
        """See `ekko.http.Source`."""
        return {"boot": f"{self._boot:016x}", **self._metrics.delays.since(since)}

    def picture(self) -> NodePicture | None:
        """The node now; None before there is a store."""
        if self._parts is None:
            return None
        parts, now = self._parts, _now()
        protocol = parts.machine.status(now)
        keyspaces = {keyspace.keyspace: keyspace for keyspace in protocol.keyspaces}
        requests = sum(model.requests for model in parts.store.models.values())
        models = tuple(
            _model_picture(model, [keyspaces[n] for n in model.spec.keyspaces if n in keyspaces], now.unix_ms, requests)
            for model in parts.store.models.values()
            if keyspaces.keys() & set(model.spec.keyspaces)
        )
        counters = asdict(parts.machine.counters)
        counters |= {f"transport_{name}": count for name, count in asdict(parts.transport.counters).items()}
        counters |= {"local_malformed": self._endpoint.malformed, "local_unanswerable": self._endpoint.unanswerable}
        cache = sum((model.cache_stats() for model in parts.store.models.values()), CacheStats())
        counters |= {"cache_hits": cache.hits, "cache_misses": cache.misses}
        counters |= {"cache_pruned": cache.pruned, "cache_left_out": cache.left_out}
        counters |= {f"compression_{name}": count for name, count in asdict(parts.runtime.outgoing.counters).items()}
        counters |= {"peers_shut_out": parts.runtime.conduct.shut_outs, "shut_out_messages": parts.runtime.conduct.dropped}
        evictions = [model.eviction for model in parts.store.models.values() if model.eviction is not None]
        counters |= {"publishes_refused_full": self._full}
        counters |= {"rows_evicted": sum(one.evicted for one in evictions)}
        counters |= {"rows_refused_full": sum(one.refused for one in evictions)}
        counters |= {"keys_kept": 0 if parts.keys is None else parts.keys.kept}
        own_queues = (
            QueueStatus("local_requests", self._endpoint.pending, REQUESTS_PENDING_MAX),
            QueueStatus("update_cache", cache.cached, cache.window),
        )
        return NodePicture(
            __version__,
            parts.transport.address,
            str(self.config.node.run_dir),
            time.monotonic() - self._started_s,
            parts.store.resumed,
            tuple(self.waiting_for()),
            protocol,
            models,
            (*protocol.queues, *own_queues),
            counters,
            dict(parts.runtime.rejected),
            self._leftovers.bytes(time.monotonic()),
            None if self._snapshots is None else self._snapshots.picture,
            self._loads.picture,
            parts.operations.aliases(),
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a running node consists of, all made at once."""

    store: Store
    machine: Machine
    transport: ZmqTransport
    runtime: Runtime
    keys: NodeKeys | None
    operations: Operations


def _log_snapshot(picture: SnapshotPicture) -> None:
    if picture.error:
        log.warning("snapshot_failed", reason=picture.error)
    else:
        log.info("snapshot_written", snapshot=picture.name, bytes=picture.bytes, full=picture.full, seconds=picture.seconds)


def machine_hash() -> int:
    """Names this machine since its boot: whose monotonic clock a time is of."""
    return int(xxhash.xxh64_intdigest(kernel_boot_id().encode()))


def _now() -> m.Now:
    return m.Now(time.monotonic_ns() // 1_000_000, time.time_ns() // 1_000_000)


def _model_picture(model: ModelStore, parts: list[KeyspaceStatus], unix_ms: int, requests: float) -> ModelPicture:
    """What is to be said of a model, of whose held partitions there is a status each; `requests`: of readers to all models."""
    synced_until_ms = min(part.synced_until_ms for part in parts)
    dims = {table.name: table.dim for table in model.spec.tables.values()} | {DENSE_TABLE: DENSE_DIM}
    stats, heat = model.table_stats(), model.heat
    return ModelPicture(
        model.spec.name,
        model.shards,
        model.spec.partitions,
        model.hold,
        all(part.synced for part in parts),
        max(0, unix_ms - synced_until_ms) if synced_until_ms else None,
        sum(part.open_steps for part in parts),
        sum(part.steps_dropped for part in parts),
        ", ".join(dict.fromkeys(part.pulling_from for part in parts if part.pulling_from)),
        model.spec.codec,
        tuple(
            TablePicture(
                name,
                dims[name],
                stat.rows,
                stat.tombstones,
                stat.bytes,
                stat.free_bytes,
                heat[name].stats() if name in heat else HeatStats(),
            )
            for name, stat in stats.items()
        ),
        tuple(model.spec.tensors.values()),
        model.memory_bytes,
        None if model.capacity is None else model.capacity.bytes,
        model.requests / requests if requests else 0.0,
        model.spec.id,
        incomplete_shards=int(model.incomplete.sum()),
        collection_held_up_by=tuple(dict.fromkeys(node for part in parts for node in part.collection_held_up_by)),
        held_up_ms=max((part.held_up_ms for part in parts), default=0),
        full_ms=max((part.full_ms for part in parts if part.full_ms is not None), default=None),
    )


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
