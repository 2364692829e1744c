"""All models of one node in shared memory: the `p2p.replica.Host` that the protocol machine replicates.

`Store.open` resumes what a daemon before this one left, when that is intact: the machine was not booted since, the layout is
ours, and every file is there. A row that was half-written is taken back, and a step that was pending is merged into the vector
(R4, R23). Otherwise the store begins empty, under new file names, and old readers are told to attach anew.

One process writes a store at a time; the daemon holds a lock file in `run_dir` for that.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Mapping as ReadOnlyMapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ekko.errors import ModelError, StoreError
from ekko.generations import Alias, Dropped, DroppedTable, Fact, Generation, Registers, ids_before, is_register, parse_facts
from ekko.health.summaries import Summaries
from ekko.health.verdicts import Verdicts
from ekko.model import DENSE_TABLE, ModelSpec, TableSpec, TensorSpec, is_training
from ekko.priority.demand import Demand
from ekko.rates import Rates
from ekko.rollback.facts import Rollbacks
from ekko.store import layout, schema
from ekko.store.access import DEFAULT_ACCESS, Access
from ekko.store.capacity import Capacity
from ekko.store.control import Control, fresh_memory, remove_unnamed
from ekko.store.facts import Facts
from ekko.store.listening import Listener
from ekko.store.manifest import CONTROL_NAME, MANIFEST_NAME, ModelEntry, kernel_boot_id, read_manifest
from ekko.store.memory import AnonymousMemory, Memory, TmpfsMemory
from ekko.store.model_store import ModelStore
from ekko.store.partition import copy_held, replicas_of
from ekko.store.room import Cost, NoRoomError, check_room, cost_of
from p2p.errors import BlamelessError, SchemaClashError
from p2p.replica import Replica, SchemaEntry

# A tmpfs on every Linux.
MEMORY_DIR = Path("/dev/shm")  # noqa: S108
# What a table may grow to. Costs nothing until it is used; 47 bits of addresses hold two thousand such tables.
TABLE_BYTES_MAX = 64 << 30
ANONYMOUS_TABLE_BYTES_MAX = 2 << 30


class Store:
    """Models of one node. Use `Store.open` or `Store.anonymous`."""

    def __init__(self, memory: Memory, table_bytes_max: int) -> None:
        self.resumed = False
        self._memory = memory
        self._table_bytes_max = table_bytes_max
        self._models: dict[str, ModelStore] = {}
        self._by_id: dict[int, Replica] = {}
        self._costs: dict[str, Cost] = {}  # of each model
        self._asked: dict[str, ModelSpec] = {}  # what this node's configuration names
        self._unasked: dict[str, int] = {}  # memory of what else there is of each model, before any row
        self._control: Control | None = None  # None: nobody can attach to it
        self._registers = Registers()
        self.facts = Facts([Verdicts(), Summaries(), Rollbacks(), Rates(), Demand()])  # what nodes agree on beside the schema
        self._limits: dict[str, Capacity] = {}  # what models of these names may take, whichever incarnation is here
        self._holds: dict[str, Sequence[int]] = {}  # what this node's configuration wants to hold of a model of this name
        self._listen: Callable[[ModelStore], Listener] | None = None
        self.on_registers: Callable[[], None] = lambda: None  # called when aliases or what was dropped have changed

    @classmethod
    def anonymous(cls, *, table_bytes_max: int = ANONYMOUS_TABLE_BYTES_MAX) -> "Store":
        """A store in the memory of this process, for simulation: no files, no readers in other processes."""
        return cls(AnonymousMemory(), table_bytes_max)

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        memory_dir: Path = MEMORY_DIR,
        table_bytes_max: int = TABLE_BYTES_MAX,
        fill: Callable[["Store"], None] | None = None,
        access: Access | None = None,
    ) -> "Store":
        """Resume the store of `run_dir`, or begin an empty one.

        Args:
            run_dir: where the manifest is; made when absent.
            memory_dir: a tmpfs.
            table_bytes_max: address space to reserve for the rows of a table.
            fill: puts models and rows into a store that begins; nobody sees it before it is done, and should it raise, or be
                killed, it is as if it had never been.
            access: who may read it; None: who could, or of a new one the default.

        Raises:
            StoreError: shared memory is full or cannot be used.
        """
        resumed = cls.attach(run_dir, memory_dir=memory_dir, table_bytes_max=table_bytes_max, access=access)
        return resumed if resumed is not None else cls._begin(run_dir, memory_dir, table_bytes_max, fill, access)

    @classmethod
    def attach(
        cls,
        run_dir: Path,
        *,
        memory_dir: Path = MEMORY_DIR,
        table_bytes_max: int = TABLE_BYTES_MAX,
        access: Access | None = None,
    ) -> "Store | None":
        """Resume the store of `run_dir`; None where there is none that is intact. Arguments and errors as `open`."""
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"run_dir {run_dir} cannot be made: {error.strerror}") from error
        if not memory_dir.is_dir():
            raise StoreError(f"memory_dir {memory_dir} is not a directory: name a mounted tmpfs")
        if access is not None:
            access.open_folder(run_dir)  # first: who may not give it away has no damaged files
        return cls._resume(run_dir, memory_dir, table_bytes_max, access)

    def reopened(self) -> "Store":
        """This anonymous store as the node's next process finds it: repaired by the code that attaches after a kill."""
        assert isinstance(self._memory, AnonymousMemory)
        store = Store(self._memory, self._table_bytes_max)
        store._registers = self._registers
        store.facts = self.facts.reopened()
        for model in self._models.values():
            store._insert(ModelStore.open(model.entry(), self._memory, self._table_bytes_max))
        store.resumed = True
        return store

    @classmethod
    def _resume(cls, run_dir: Path, memory_dir: Path, table_bytes_max: int, access: Access | None) -> "Store | None":
        """The store as it was left, or None when it is not intact."""
        try:
            manifest = read_manifest(run_dir)
            if (
                manifest is None
                or manifest.layout_version != layout.LAYOUT_VERSION
                or manifest.boot_id != kernel_boot_id()
                or manifest.memory_dir != str(memory_dir)
            ):
                return None
            memory = TmpfsMemory(memory_dir, manifest.prefix, access or Access.of(run_dir / MANIFEST_NAME))
            control = Control.attach(memory, run_dir)
            if control is None:
                return None
            store = cls(memory, table_bytes_max)
            store._control = control
            store._registers = manifest.registers
            store.facts.keep_in(run_dir)
            for entry in manifest.models:
                store._insert(ModelStore.open(entry, memory, table_bytes_max))
        except (StoreError, OSError, ValueError):
            return None  # damaged or missing files: nothing of them may be trusted (R4)
        store.resumed = True
        if access is not None:
            control.open_to(access, store._file_names())
        control.remove_strangers(store._file_names())
        return store

    @classmethod
    def _begin(
        cls,
        run_dir: Path,
        memory_dir: Path,
        table_bytes_max: int,
        fill: Callable[["Store"], None] | None,
        access: Access | None,
    ) -> "Store":
        memory = fresh_memory(run_dir, memory_dir, access or DEFAULT_ACCESS)
        store = cls(memory, table_bytes_max)
        with suppress(StoreError, OSError):  # one that cannot be read has none; peers tell us again
            before = read_manifest(run_dir)
            store._registers = Registers() if before is None else before.registers
        store.facts.keep_in(run_dir)
        if fill is not None:
            # What a kill left of the attempt before would take the room of this one.
            remove_unnamed(run_dir, memory)
            try:
                fill(store)
                store._learn([], [])  # what was dropped since is not brought back by an old snapshot
            except BaseException:
                store.close()
                for path in memory_dir.glob(f"{memory.prefix}-*"):
                    path.unlink(missing_ok=True)
                raise
        store._found_at(run_dir)
        return store

    def narrowed(self, hold: ReadOnlyMapping[str, Sequence[int]]) -> "Store":
        """This store without the partitions that `hold` leaves out of a model: a copy, whose files take the place of these.

        Models that it does not name are kept whole. Both stores exist until the copy is complete; a kill meanwhile changes
        nothing. Afterwards only the result may be used.

        Raises:
            StoreError: shared memory has no room for what is kept beside what there is.
        """
        models = self._models.items()
        kept = {name: tuple(p for p in model.hold if p in hold.get(name, model.hold)) for name, model in models}
        if all(kept[name] == model.hold for name, model in models):
            return self
        control = self._control
        memory: Memory = AnonymousMemory()
        if control is not None:
            memory = fresh_memory(control.run_dir, control.memory.directory, control.memory.access)
        store = Store(memory, self._table_bytes_max)
        store._registers = self._registers
        store.facts = self.facts
        for name, model in models:
            twin = ModelStore.create(replace(model.entry(), hold=list(kept[name])), memory, self._table_bytes_max)
            copy_held(model, twin)
            store._insert(twin)
        store.resumed = self.resumed
        if control is not None:
            self.close()
            store._found_at(control.run_dir)
        return store

    def _found_at(self, run_dir: Path) -> None:
        """Become the store of this run_dir: readers of the one before are told, and its files removed."""
        assert isinstance(self._memory, TmpfsMemory)
        self._control = Control.begin(self._memory, run_dir, self._entries(), self._registers)
        self._control.remove_strangers(self._file_names())

    def _file_names(self) -> set[str]:
        assert isinstance(self._memory, TmpfsMemory)
        names = [CONTROL_NAME, *(name for model in self._models.values() for name in model.file_names())]
        return {self._memory.path(name).name for name in names}

    def close(self) -> None:
        """Let go of the memory; the files stay, for readers and for the next daemon."""
        self._models.clear()
        self._by_id.clear()
        self._costs.clear()
        self._unasked.clear()
        self._control = None

    def destroy(self) -> None:
        """Remove the store: its files and its manifest. Attached readers are told."""
        if self._control is not None:
            self._control.destroy()
        self.close()

    # --- models -----------------------------------------------------------------------------------------------------

    @property
    def models(self) -> ReadOnlyMapping[str, ModelStore]:
        """Live view: name -> model."""
        return MappingProxyType(self._models)

    def add_model(
        self, spec: ModelSpec, capacity_rows: int = 0, hold: Sequence[int] | None = None, *, asked: bool = True
    ) -> ModelStore:
        """Have this model, with at least these tables and tensors.

        Args:
            spec: what there is to be; what exists already is kept.
            capacity_rows: a first guess of the rows of all its tables together.
            hold: partitions to hold here, beside those that are held already; None: all of a model that is new, else no more.
            asked: this node's own configuration names it; what peers and publishers bring has a bound of its own.

        Raises:
            ModelError: it contradicts the model that exists, or there is no room for it. Nothing is changed.
            StoreError: shared memory is full.
        """
        if asked and hold is not None:
            self._holds[spec.name] = tuple(hold)
        model = self._models.get(spec.name)
        self._check_new(spec)
        self._check_room([spec], asked)
        if hold is not None and not set(hold) <= set(range(spec.partitions)):
            raise ModelError(f"model {spec.name!r} has partitions 0 to {spec.partitions - 1}: cannot hold {list(hold)}")
        if model is None:
            tables = max(1, len(spec.tables))
            entry = ModelEntry(
                spec.name,
                spec.shards,
                capacity_rows // tables,
                partitions=spec.partitions,
                codec=spec.codec,
                incarnation=spec.incarnation,
            )
            entry = entry if hold is None else replace(entry, hold=sorted(set(hold)))
            model = ModelStore.create(entry, self._memory, self._table_bytes_max)
        changed = spec.name not in self._models
        changed |= hold is not None and model.hold_more(hold)
        for table in spec.tables.values():
            changed |= model.add_table(table)
        for tensor in spec.tensors.values():
            changed |= model.add_tensor(tensor)
        if asked:
            before = self._asked.get(spec.name, spec)
            self._asked[spec.name] = replace(spec, tables=before.tables | spec.tables, tensors=before.tensors | spec.tensors)
        self._insert(model)
        if changed:
            self._publish_manifest()
        return model

    def add_entry(self, entry: ModelEntry, rows: ReadOnlyMapping[int, int]) -> ModelStore:
        """Have a model as a snapshot describes it, in a store that begins; `rows` says how many come into each table.

        Raises:
            ModelError: it contradicts another model.
            StoreError: shared memory is full.
        """
        schema.check_new(entry.bare_spec, None, [model.spec for model in self._models.values()])
        model = ModelStore.create(entry, self._memory, self._table_bytes_max)
        for table in entry.tables:
            model.add_table(table, max(1, rows.get(table.id, 0)))
        for tensor in entry.tensors:
            model.add_tensor(tensor)
        self._insert(model)
        return model

    def add_table(self, model: str, table: TableSpec, capacity_rows: int = 0) -> None:
        """Have this table in an existing model. Raises as `add_model`."""
        store = self._known(model)
        self._check_new(schema.alone(store.spec, [table], []))
        if store.add_table(table, capacity_rows):
            self._insert(store)
            self._publish_manifest()

    def add_tensor(self, model: str, tensor: TensorSpec) -> None:
        """Have this dense tensor in an existing model. Raises as `add_model`."""
        store = self._known(model)
        self._check_new(schema.alone(store.spec, [], [tensor]))
        if store.add_tensor(tensor):
            self._insert(store)
            self._publish_manifest()

    def _known(self, name: str) -> ModelStore:
        if name not in self._models:
            raise ModelError(f"there is no model {name!r}: there are {', '.join(map(repr, self._models)) or 'none'}")
        return self._models[name]

    def _check_new(self, spec: ModelSpec, ending: Collection[str] = ()) -> None:
        """Refuse what contradicts the models that are here, but those that end.

        Raises:
            ModelError: naming the contradiction.
        """
        held = {name: model.spec for name, model in self._models.items() if name not in ending}
        schema.check_new(spec, held.get(spec.name), held.values())

    # --- generations ------------------------------------------------------------------------------------------------

    @property
    def registers(self) -> Registers:
        """Aliases, and what was dropped, as far as is known here."""
        return self._registers

    def current(self, spec: ModelSpec) -> ModelSpec:
        """The same, as the incarnation of its name that is here, or that whoever gets the name now would be; so its tables."""
        held = self._models.get(spec.name)
        incarnation = self._registers.next_incarnation(spec.name) if held is None else held.spec.incarnation
        generation, here = Generation(spec.name, incarnation), {} if held is None else held.spec.tables
        tables = {
            name: replace(
                table,
                incarnation=here[name].incarnation if name in here else self._registers.next_table(generation, name),
            )
            for name, table in spec.tables.items()
        }
        return replace(spec, incarnation=incarnation, tables=tables)

    def generation(self, name: str) -> Generation | None:
        """The model of this name that is here."""
        held = self._models.get(name)
        return None if held is None else Generation.of(held.spec)

    def holds(self, generation: Generation) -> bool:
        """Whether this model is here."""
        return self.generation(generation.name) == generation

    def set_alias(self, alias: Alias) -> None:
        """Have an alias stand for something from its moment on."""
        self._learn([alias], [])

    def learn_registers(self, registers: Registers) -> None:
        """Take over aliases, and what was dropped, from a snapshot; what is known here and newer stays."""
        self._learn(registers.facts(), [])

    def drop_model(self, name: str, unix_ms: int) -> int:
        """Drop a model for good, everywhere: its memory is given back, and readers are told.

        Returns:
            Bytes of shared memory that it had.

        Raises:
            ModelError: there is no such model.
        """
        spec = self._known(name).spec
        taken = sum(stat.bytes for stat in self._models[name].table_stats().values())
        self._learn([Dropped(name, spec.incarnation, unix_ms)], [])
        return taken

    def drop_table(self, model: str, table: str, unix_ms: int) -> int:
        """Drop a table for good, everywhere: its memory is given back, and readers are told.

        Returns:
            Bytes of shared memory that it had.

        Raises:
            ModelError: there is no such table, or it is the reserved one.
        """
        held = self._known(model)
        if table == DENSE_TABLE:
            raise ModelError(f"table {DENSE_TABLE!r} of model {model!r} holds its dense tensors: it goes with the model")
        if table not in held.spec.tables:
            known = ", ".join(map(repr, held.spec.tables)) or "none"
            raise ModelError(f"model {model!r} has no table {table!r}: it has {known}")
        taken = held.table_stats()[table].bytes
        fact = DroppedTable(Generation.of(held.spec), table, held.spec.tables[table].incarnation, unix_ms)
        self._learn([fact], [])
        return taken

    def settle_aliases(self, unix_ms: int) -> bool:
        """Let switches up to this moment count for readers; True when there were some."""
        if self._control is None:
            return False
        before = self._control.settle_aliases(unix_ms)
        settled = any(before < alias.effective_ms <= unix_ms for alias in self._registers.aliases.values())
        if settled:
            self._control.tell_readers()
        return settled

    def _learn(self, facts: Iterable[Fact], wanted: Sequence[ModelSpec]) -> bool:
        """Merge facts, and let go of the models and tables that they or newer incarnations end; True when something changed.

        The manifest is written before any file goes: who reads it finds all that it names.
        """
        merged = self._registers.merged(facts)
        gone = self._ended(merged, wanted)
        tables = {name: schema.ended_tables(one.spec, merged, wanted) for name, one in self._models.items() if name not in gone}
        if merged is self._registers and not gone and not any(tables.values()):
            return False
        self._registers = merged
        self.facts.forget(merged.is_dropped)
        files = [file for name in gone for file in self._models[name].file_names()]
        files += [file for name, ended in tables.items() for file in self._models[name].file_names(ended)]
        for name in gone:
            model = self._models.pop(name)
            model.let_go()
            for number in {model.spec.id, *model.spec.keyspaces}:
                self._by_id.pop(number, None)
            for known in (self._costs, self._asked, self._unasked):
                known.pop(name, None)
        for name in [name for name, ended in tables.items() if ended]:
            self._let_go_of_tables(self._models[name], tables[name])
        for model in self._models.values():
            self._note_late(model)
        self._publish_manifest()
        for file in files:
            self._memory.remove(file)
        self.on_registers()
        return True

    def _let_go_of_tables(self, model: ModelStore, tables: Sequence[str]) -> None:
        model.let_go_of_tables(tables)
        if (asked := self._asked.get(model.spec.name)) is not None:
            left = {name: table for name, table in asked.tables.items() if name not in tables}
            self._asked[model.spec.name] = replace(asked, tables=left)
        self._insert(model)

    def _note_late(self, model: ModelStore) -> None:
        """Tell a model of which tables rows may come late."""
        # One may have ended since a peer told of the next one of its name, before it told of the drop.
        ended = {
            number: table.name for table in model.spec.tables.values() for number in ids_before(table.name, table.incarnation)
        }
        model.tables_dropped = ended | self._registers.tables_dropped(Generation.of(model.spec))

    def _ended(self, registers: Registers, wanted: Sequence[ModelSpec]) -> list[str]:
        return schema.ended([model.spec for model in self._models.values()], registers, wanted)

    def _check_room(self, specs: Sequence[ModelSpec], asked: bool, ending: Collection[str] = ()) -> None:
        """Refuse more than this node has room for.

        Raises:
            NoRoomError: naming what there is too much of.
        """
        held = {name: model.spec for name, model in self._models.items() if name not in ending}
        new = [cost_of(spec, held.get(spec.name)) for spec in specs]
        before = sum(taken for name, taken in self._unasked.items() if name not in ending)
        unasked = 0 if asked else before + sum(cost.memory_bytes for cost in new)
        check_room([cost for name, cost in self._costs.items() if name not in ending], new, unasked)

    def listen(self, listener_of: Callable[[ModelStore], Listener]) -> None:
        """Have somebody told of all that comes to each model, those that come later included."""
        self._listen = listener_of
        for model in self._models.values():
            model.listener = listener_of(model)

    @property
    def memory(self) -> TmpfsMemory:
        """Where its files are: of a store that other processes can attach to."""
        assert isinstance(self._memory, TmpfsMemory)
        return self._memory

    @property
    def identity(self) -> str:
        """Names this memory: another one, also of the same node, has another."""
        return self._memory.prefix if isinstance(self._memory, TmpfsMemory) else f"memory-{id(self._memory):x}"

    def limit(self, name: str, allowed: Capacity) -> None:
        """Keep the model of this name within its capacity, also one that gets the name later; what it has already stays."""
        self._limits[name] = allowed
        if name in self._models:
            self._models[name].limit(allowed)

    def _insert(self, model: ModelStore) -> None:
        self._models[model.spec.name] = model
        self._note_late(model)
        if model.listener is None and self._listen is not None:
            model.listener = self._listen(model)
        if model.capacity is None and model.spec.name in self._limits:
            model.limit(self._limits[model.spec.name])
        self._costs[model.spec.name] = cost_of(model.spec)
        self._unasked[model.spec.name] = cost_of(model.spec, self._asked.get(model.spec.name)).memory_bytes
        for replica in replicas_of(model):
            self._by_id.setdefault(replica.keyspace, replica)

    def _publish_manifest(self) -> None:
        """Write the manifest, then tell attached readers."""
        if self._control is not None:
            self._control.publish(self._entries(), self._registers)

    def _entries(self) -> list[ModelEntry]:
        return [model.entry() for model in self._models.values()]

    # --- p2p.replica.Host -------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> ReadOnlyMapping[int, Replica]:
        return MappingProxyType(self._by_id)

    def schema(self) -> list[SchemaEntry]:
        entries = [entry for model in self._models.values() for entry in model.spec.entries()]
        entries += self._registers.entries()
        entries += self.facts.entries()
        return sorted(entries, key=lambda entry: (entry.keyspace, entry.name))

    def adopt(self, entries: Sequence[SchemaEntry]) -> bool:
        self.facts.learned(entries, self._registers.is_dropped)  # whatever is refused is refused as a whole
        changed = self._adopt_models([entry for entry in entries if not self.facts.has(entry)])
        return self.facts.take(self.facts.learned(entries, self._registers.is_dropped)) or changed

    def _adopt_models(self, entries: Sequence[SchemaEntry]) -> bool:
        known = {(entry.keyspace, entry.name): entry.body for entry in self.schema()}
        fresh = [entry for entry in entries if known.get((entry.keyspace, entry.name)) != entry.body]
        if not fresh:
            return False
        facts = parse_facts(fresh)
        merged = self._registers.merged(facts)
        held = {name: model.spec for name, model in self._models.items()}
        wanted = schema.wanted([entry for entry in fresh if not is_register(entry)], held, merged)
        ending = self._ended(merged, wanted)
        try:
            self._check_room(wanted, asked=False, ending=ending)
            for spec in wanted:
                self._check_new(spec, ending)
            schema.check_apart(wanted)
        except NoRoomError as error:
            raise BlamelessError(f"no room for the schema of a peer: {error}") from error
        except ModelError as error:
            raise SchemaClashError(str(error)) from error
        changed = self._learn(facts, wanted)
        try:
            for spec in wanted:
                self.add_model(spec, hold=None if spec.name in self._models else self._holds_of(spec), asked=False)
        except StoreError as error:  # a peer asks for more than this machine has: its wish fails, not the node
            if not changed:
                raise BlamelessError(f"no room for the schema of a peer: {error}") from error
            return True  # what was dropped stays so; for the rest there is a next time
        return changed or bool(wanted)

    def _holds_of(self, spec: ModelSpec) -> Sequence[int] | None:
        """What the configuration wants to hold of a model that comes under a name which it knows."""
        # Of what servers train, nobody holds anything unasked.
        hold = self._holds.get(spec.name, () if is_training(spec.name) and spec.partitions > 1 else None)
        return hold if hold is not None and set(hold) <= set(range(spec.partitions)) else None
