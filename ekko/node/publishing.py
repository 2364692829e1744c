"""What publishers and `ekko load` ask of their node: open a model, store a step, wait until it is visible.

Here everything that would harm the store or the cluster is refused, before the protocol hears of it; the answer names the
remedy. What passes goes to the protocol as an event, and the answer to it comes as an effect, often before the call returns.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

import numpy as np

from ekko.ceilings import AboveAsk
from ekko.config import NodeSection
from ekko.errors import ModelError, PublishError
from ekko.health.wire import Report, Reported
from ekko.loading import LoadRequest
from ekko.local import (
    FENCED,
    REOPEN,
    RESTORED,
    Answer,
    Failed,
    Held,
    Open,
    Opened,
    Ping,
    Pong,
    PublishPair,
    PublishStep,
    Request,
    Wait,
)
from ekko.model import CODEC_DEFAULT, DENSE_TABLE, SHARDS_DEFAULT, ModelSpec, TableSpec, table_id
from ekko.node.restored import RestoredRows
from ekko.priority.origin import Priorities, check_significance
from ekko.restored import RestoredAsk
from ekko.snapshots.files import LoadPlan
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.errors import RemoteProtocolError
from p2p.runtime import read_clock

# A model that a publisher brings begins with room for this many rows; slabs grow.
CAPACITY_ROWS_GUESS = 65_536
_DENSE = table_id(DENSE_TABLE)
# A step of `ekko load`, one at a time; requests of the local endpoint count from 0.
LOAD_REQUEST = -2


class Publishing:
    """Answers the requests of one node's publishers (`ekko.endpoint.Handler`), and those of `ekko load`.

    Args:
        node: who answers.
        store: what is published to.
        submit: hands an event to the protocol; returns why it failed, None: the answer comes as an effect.
        protocol_min: the oldest protocol version that a live member speaks.
        restored: what rollbacks took back.
        priorities: what classes rows get; None: as without settings.
    """

    def __init__(
        self,
        node: NodeSection,
        store: Store,
        submit: Callable[[m.PublishRequested | m.WaitRequested | m.AboveRequested | m.SchemaChanged], Failed | None],
        protocol_min: Callable[[], int],
        restored: RestoredRows,
        priorities: Priorities | None = None,
    ) -> None:
        self._node = node
        self._restored = restored
        self._store = store
        self._submit = submit
        self._protocol_min = protocol_min
        self.priorities = Priorities(store.models) if priorities is None else priorities
        self._load_answer: asyncio.Future[int] | None = None
        self.on_report: Callable[[Report], Reported] = _no_reports
        self.on_pair: Callable[[int, PublishPair], Failed | None] = _no_pairs
        self.refused_full = 0  # steps that were refused, for want of room in their model

    def handle_request(self, number: int, request: Request) -> Answer | None:
        """See `ekko.endpoint.Handler`."""
        match request:
            case Ping():
                return Pong(self._node.id)
            case Open():
                return self._open(request)
            case PublishStep():
                return self.publish(number, request)
            case PublishPair():
                return self.on_pair(number, request)
            case Wait(model, stamp, scope, timeout_ms, _, incarnation):
                held = self._store.models.get(model)
                if held is None:
                    raise ModelError(self._unknown(model))
                self._check_same(held, incarnation)
                return self._submit(m.WaitRequested(number, held.spec.id, stamp, scope, timeout_ms))
            case Report():
                return self.on_report(request)
            case RestoredAsk(model):
                held = self._store.models.get(model)
                if held is None:
                    raise ModelError(self._unknown(model))
                return self._restored.page(held, request)
            case AboveAsk(model, stamp, timeout_ms, incarnation):
                self.check_may_publish()
                held = self._store.models.get(model)
                if held is None:
                    raise ModelError(self._unknown(model))
                self._check_same(held, incarnation)
                return self._submit(m.AboveRequested(number, held.spec.id, stamp, timeout_ms))
            case _:
                assert_never(request)

    # --- open a model

    def _open(self, request: Open) -> Opened:
        self.check_may_publish()
        held = self._store.models.get(request.model)
        self._check_no_alias(request.model)
        if held is None and request.tables is None:
            raise ModelError(f"{self._unknown(request.model)}; give its tables to create it")
        wanted = self._wanted(request, held)
        if request.again is not None:
            if wanted.incarnation != request.again.incarnation:
                raise ModelError(self._another(request.model))
            same = request.again.tables
            wanted = replace(wanted, tables={name: t for name, t in wanted.tables.items() if same.get(name, t.id) == t.id})
        if held is None or not wanted.tables.keys() <= held.spec.tables.keys():
            self._grow_schema(wanted)
        else:  # refuses what contradicts it
            self._store.add_model(wanted, asked=False)
        return self._opened(self._store.models[request.model])

    def _opened(self, model: ModelStore) -> Opened:
        tables, tensors = model.spec.tables.values(), dict(model.spec.tensors)
        dims, numbers = {t.name: t.dim for t in tables}, {t.name: t.id for t in tables if t.id != table_id(t.name)}
        own, node = Held(model.spec.incarnation, numbers), self._node
        return Opened(node.id, node.region, model.shards, dims, tensors, model.last_stamp, model.spec.codec, own)

    def _check_no_alias(self, model: str) -> None:
        """Readers name aliases, publishers name models: a trainer of the old generation that is started again would otherwise
        write into the new one.

        Raises:
            ModelError: naming the model.
        """
        if model not in self._store.models and (aliased := self._store.registers.resolve(model)) is not None:
            raise ModelError(
                f"{model!r} is an alias, now of model {aliased.name!r}: publish to a model by its own name, so that "
                "what is written does not depend on when the alias is switched"
            )

    def _wanted(self, request: Open, held: ModelStore | None) -> ModelSpec:
        """The model that a publisher asks for; what it does not say is as it is here, or the default."""
        shards = request.shards or (SHARDS_DEFAULT if held is None else held.shards)
        codec = request.codec or (CODEC_DEFAULT if held is None else held.spec.codec)
        known_ttls = {} if held is None else {table.name: table.ttl_s for table in held.spec.tables.values()}
        tables = {
            name: TableSpec(name, dim, codec, known_ttls.get(name, 0) if ttl_s is None else ttl_s)
            for name, dim, ttl_s in request.tables or ()
        }
        partitions = 1 if held is None else held.spec.partitions
        return self._store.current(ModelSpec(request.model, shards, tables, partitions=partitions, codec=codec))

    def _grow_schema(self, spec: ModelSpec) -> None:
        oldest = self._protocol_min()
        if oldest < spec.since:
            raise ModelError(
                f"model {spec.name!r} has a codec, partitions or a ttl, which protocol version {oldest} does not know and "
                "some node still speaks: upgrade all nodes first (`ekko status` shows who)"
            )
        self._store.add_model(spec, CAPACITY_ROWS_GUESS, asked=False)
        self._submit(m.SchemaChanged())

    def _unknown(self, model: str) -> str:
        known = ", ".join(map(repr, self._store.models)) or "none"
        what = f"model {model!r} was dropped" if model in self._store.registers.dropped else f"unknown model {model!r}"
        return f"{what} at node {self._node.id!r}: known: {known}"

    def _check_same(self, model: ModelStore, incarnation: int) -> None:
        """Refuse a publisher that was opened before its model was dropped: the rows of the one are not the other's.

        Raises:
            ModelError: with the remedy.
        """
        if model.spec.incarnation != incarnation:
            raise ModelError(self._another(model.spec.name))

    def _another(self, model: str) -> str:
        return (
            f"model {model!r} was dropped, and another one has its name at node {self._node.id!r}: make a new Publisher to "
            "publish to that one"
        )

    # --- store a step

    def publish(self, number: int, step: PublishStep, *, quiet: bool = False) -> Failed | None:
        """Check what would harm the store, then hand the step to the protocol.

        That keys are unique within a table is the publisher's part: of duplicates the store keeps the first.

        Raises:
            EkkoError: the step is refused.
        """
        self.check_may_publish()
        model = self._store.models.get(step.model)
        if model is None and step.model in self._store.registers.dropped:
            raise ModelError(f"{self._unknown(step.model)}; make a new Publisher to begin one of this name anew")
        if model is None:
            return Failed(REOPEN, f"unknown model {step.model!r}")
        self._check_same(model, step.incarnation)
        if step.codec != model.spec.codec:
            return Failed(REOPEN, f"rows in codec {step.codec!r} for model {step.model!r}, which has {model.spec.codec!r}")
        self._check_room(model, step)
        tables = [column.table for column in step.columns]
        if len(set(tables)) != len(tables):
            raise PublishError("a step names one table twice")
        if gone := [model.tables_dropped[table] for table in tables if table in model.tables_dropped]:
            raise ModelError(
                f"table {gone[0]!r} of model {step.model!r} was dropped at node {self._node.id!r}: publish without it, or make "
                "a new Publisher with it among its tables to begin one of this name anew; nothing was published"
            )
        if not all(table in model.tables_by_id or table == _DENSE for table in tables):
            return Failed(REOPEN, f"unknown table of model {step.model!r}")
        new = {tensor.name: tensor for tensor in step.tensors if model.spec.tensors.get(tensor.name) != tensor}
        if new:
            self._grow_schema(replace(model.spec, tables={}, tensors=new))
        try:
            model.check(step.columns)
        except RemoteProtocolError as error:
            raise ModelError(str(error)) from None
        self._check_held(model, step)
        if (refused := self._rolled_back(model, step)) is not None:
            return refused
        for column, weights in zip(step.columns, step.significance, strict=True):
            if weights is not None:
                check_significance(model.tables_by_id[column.table].spec.name, weights)
        columns = self.priorities.classify(model, step.columns, step.significance, read_clock())
        return self._submit(m.PublishRequested(number, model.keyspace, columns, step.published_ns, quiet))

    def wait_everywhere(self, number: int, model: str, stamp: int, timeout_ms: int) -> Failed | None:
        """Have the protocol wait until a step is visible everywhere."""
        held = self._store.models.get(model)
        if held is None:
            return Failed("model", self._unknown(model))
        return self._submit(m.WaitRequested(number, held.spec.id, stamp, m.Scope.ALL, timeout_ms))

    def _rolled_back(self, model: ModelStore, step: PublishStep) -> Failed | None:
        """Why a step is refused whose model is rolled back, or was, since its publisher looked; None: it is not."""
        if (fence := self._restored.fence(model)) is not None:
            why = f": {fence.note}" if fence.note else ""
            return Failed(
                FENCED,
                f"it is being rolled back (epoch {fence.epoch}{why}), and its writers are stopped: publish again when that is "
                'over (`ekko status`), or make the Publisher with while_fenced="wait"; nothing was published',
            )
        epoch = self._restored.epoch(model)
        if step.epoch is None or step.epoch >= epoch:
            return None
        return Failed(
            RESTORED,
            f"it was rolled back (epoch {epoch}) since this publisher looked, and the step was worked out before: load what "
            "Publisher.restored() names into the model in training, then publish again; nothing was published",
        )

    def check_may_publish(self) -> None:
        """Refuse what only training nodes may do.

        Raises:
            PublishError: this is none.
        """
        node = self._node
        if node.role != "train":
            raise PublishError(f"node {node.id!r} has role {node.role!r}: publish to a node with role 'train'")

    def _check_room(self, model: ModelStore, step: PublishStep) -> None:
        try:
            model.check_step(step.columns)
        except PublishError as error:
            self.refused_full += 1
            raise PublishError(f"node {self._node.id!r}: {error}") from None

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
                    f"{self._node.id!r} holds {list(model.hold)}: publish them at a node that holds them, or add them to "
                    f"models.{step.model}.hold; nothing was published"
                )

    # --- load a file

    def open_to_load(self, request: LoadRequest, plan: LoadPlan | None) -> Opened:
        """See `ekko.loading.Loading`."""
        self._check_no_alias(request.model)
        held = self._store.models.get(request.model)
        codec = request.codec or CODEC_DEFAULT if held is None else held.spec.codec
        if request.codec not in (None, codec):
            raise ModelError(f"model {request.model!r} has codec {codec!r}, not {request.codec!r}: load it as another model")
        if plan is not None:
            known = {} if held is None else held.spec.tables
            new = {name: table for name, table in plan.table_specs(codec).items() if name not in known}
            if held is None or new:
                bare = ModelSpec(request.model, codec=codec) if held is None else held.spec.bare()
                self._grow_schema(self._store.current(replace(bare, tables=new)))
                held = self._store.models[request.model]
        if held is None:
            return Opened(self._node.id, self._node.region, SHARDS_DEFAULT, {}, codec=codec)
        return self._opened(held)

    async def publish_loaded(self, step: PublishStep) -> int:
        """See `ekko.loading.Loading`."""
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._load_answer = answered
        failed = self.publish(LOAD_REQUEST, step, quiet=True)
        if failed is not None:
            raise PublishError(failed.reason)
        return await answered

    def on_loaded(self, answer: int | PublishError) -> None:
        """The protocol's answer to `publish_loaded`: a stamp, or why there is none."""
        if self._load_answer is None or self._load_answer.done():
            return
        if isinstance(answer, int):
            self._load_answer.set_result(answer)
        else:
            self._load_answer.set_exception(answer)


def _no_pairs(_: int, __: PublishPair) -> Failed | None:
    raise ModelError("the node takes no steps yet: it is starting")


def _no_reports(_: Report) -> Reported:
    raise ModelError("the node takes no reports yet: it is starting")
