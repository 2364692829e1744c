"""What models a store may have: whether a wish agrees with what is there, and what the entries of a peer ask for.

Pure: nothing here changes anything. `Store` has what these functions let pass.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from ekko.errors import ModelError
from ekko.generations import Generation, Registers
from ekko.model import DENSE_TABLE, TABLES_MAX, TENSORS_MAX, ModelSpec, TableSpec, TensorSpec, parse_entry
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

# --- does it agree with what is there ------------------------------------------------------------------------------------


def check_new(spec: ModelSpec, held: ModelSpec | None, others: Iterable[ModelSpec]) -> None:
    """Refuse what contradicts the model that exists, or, of a new one, another model.

    Raises:
        ModelError: naming the contradiction.
    """
    if held is None:
        _check_ids(spec, others)
        held = spec.bare()
    if held.incarnation != spec.incarnation:
        raise ModelError(f"model {spec.name!r} is here as incarnation {held.incarnation}, not {spec.incarnation}")
    if held.shards != spec.shards:
        raise ModelError(f"model {spec.name!r} has {held.shards} shards, not {spec.shards}")
    if held.partitions != spec.partitions:
        raise ModelError(
            f"model {spec.name!r} has {held.partitions} partitions, not {spec.partitions}: all nodes of a cluster divide a "
            "model in the same way"
        )
    if held.codec != spec.codec:
        raise ModelError(
            f"model {spec.name!r} has codec {held.codec!r}, not {spec.codec!r}: a model's codec is the same on all nodes"
        )
    _check_tables(held, spec)
    _check_tensors(held, spec)


def check_apart(specs: Sequence[ModelSpec]) -> None:
    """Refuse models that come together and have an id in common.

    Raises:
        ModelError: naming one of them.
    """
    taken: set[int] = set()
    for spec in specs:
        ids = {spec.id, *spec.keyspaces}
        if ids & taken:
            raise ModelError(f"model {spec.name!r} has the id of another one that came with it: rename one")
        taken |= ids


def _check_ids(spec: ModelSpec, others: Iterable[ModelSpec]) -> None:
    ids = {spec.id, *spec.keyspaces}
    for other in others:
        if ids & {other.id, *other.keyspaces}:
            raise ModelError(f"models {spec.name!r} and {other.name!r} have the same id: rename one")


def _check_tables(held: ModelSpec, new: ModelSpec) -> None:
    ids = {table.id: table.name for table in held.tables.values()} | {TableSpec(DENSE_TABLE, 1).id: DENSE_TABLE}
    for table in new.tables.values():
        if table.name == DENSE_TABLE:
            raise ModelError(f"table name {DENSE_TABLE!r} is reserved for dense tensors: choose another")
        if table.codec != held.codec:
            raise ModelError(
                f"model {new.name!r} has codec {held.codec!r}, and its table {table.name!r} cannot have {table.codec!r}"
            )
        existing = held.tables.get(table.name, table)
        if table.incarnation > existing.incarnation:  # that one ends
            continue
        if existing != table:
            what = next(what for what in ("incarnation", "dim", "ttl_s") if getattr(existing, what) != getattr(table, what))
            has, wanted = getattr(existing, what), getattr(table, what)
            raise ModelError(f"table {table.name!r} of model {new.name!r} has {what} {has}, not {what} {wanted}")
        if ids.setdefault(table.id, table.name) != table.name:
            raise ModelError(f"tables {table.name!r} and {ids[table.id]!r} have the same id: rename one")
    if len(held.tables | new.tables) > TABLES_MAX:
        raise ModelError(f"model {new.name!r} would have more than {TABLES_MAX} tables")


def _check_tensors(held: ModelSpec, new: ModelSpec) -> None:
    for tensor in new.tensors.values():
        existing = held.tensors.get(tensor.name, tensor)
        if existing != tensor:
            raise ModelError(
                f"tensor {tensor.name!r} of model {new.name!r} is {existing.dtype}{list(existing.shape)}, "
                f"not {tensor.dtype}{list(tensor.shape)}"
            )
    if len(held.tensors | new.tensors) > TENSORS_MAX:
        raise ModelError(f"model {new.name!r} would have more than {TENSORS_MAX} tensors")


# --- what the entries of a peer ask for -----------------------------------------------------------------------------------


def wanted(entries: Sequence[SchemaEntry], held: Mapping[str, ModelSpec], registers: Registers) -> list[ModelSpec]:
    """The models that these entries speak of, with what they add, but those that are over by these facts.

    Args:
        entries: of models, tables and tensors.
        held: the models that are here, by name.
        registers: what was dropped, as far as is known.

    Raises:
        RemoteProtocolError: an entry makes no sense, or speaks of a model that nobody described.
    """
    specs: dict[int, ModelSpec] = {}
    parts: list[tuple[int, TableSpec | TensorSpec]] = []
    for entry in entries:
        parsed = parse_entry(entry)
        if not isinstance(parsed, ModelSpec):
            parts.append((entry.keyspace, parsed))
        elif specs.setdefault(entry.keyspace, parsed).bare() != parsed:
            raise RemoteProtocolError(f"model {parsed.name!r} is described twice, differently")
    over = {Generation(one.name, one.incarnation) for one in registers.dropped.values()}
    past = {ModelSpec(one.name, incarnation=one.incarnation).id for one in over}
    known = {spec.id: spec for spec in held.values()}
    for keyspace, part in parts:
        if keyspace not in specs and keyspace in past:
            continue
        owner = known.get(keyspace) or specs.get(keyspace)
        if owner is not None and isinstance(part, TableSpec) and not _is_current_table(part, owner, registers):
            continue
        if keyspace not in specs and keyspace in known:
            specs[keyspace] = known[keyspace].bare()
        if keyspace not in specs:
            raise RemoteProtocolError(f"schema entry for {part.name!r} of unknown model {keyspace}")
        names: dict[str, TableSpec] | dict[str, TensorSpec]
        names = specs[keyspace].tables if isinstance(part, TableSpec) else specs[keyspace].tensors
        if names.setdefault(part.name, part) != part:  # type: ignore[arg-type]
            raise RemoteProtocolError(f"{part.name!r} is described twice, differently")
    return [spec for spec in specs.values() if _is_current(spec, held.get(spec.name), registers, specs.values())]


def _is_current(spec: ModelSpec, held: ModelSpec | None, registers: Registers, others: Iterable[ModelSpec]) -> bool:
    """Whether nothing that is known says that there is a later model of this name, or that it is dropped."""
    later = [other.incarnation for other in (*others, *(() if held is None else (held,))) if other.name == spec.name]
    return spec.incarnation >= max(later) and not registers.is_dropped(Generation.of(spec))


def _is_current_table(table: TableSpec, model: ModelSpec, registers: Registers) -> bool:
    """Whether nothing that is known says that there is a later table of this name, or that it is dropped."""
    held = model.tables.get(table.name, table)
    dropped = registers.is_table_dropped(Generation.of(model), table.name, table.incarnation)
    return table.incarnation >= held.incarnation and not dropped


def ended_tables(held: ModelSpec, registers: Registers, wanted: Sequence[ModelSpec]) -> list[str]:
    """Names of the tables of a model that are here and, by these facts and incarnations, are so no more."""
    others = [one.tables for one in wanted if Generation.of(one) == Generation.of(held)]

    def ends(table: TableSpec) -> bool:
        newer = any(tables[table.name].incarnation > table.incarnation for tables in others if table.name in tables)
        return newer or registers.is_table_dropped(Generation.of(held), table.name, table.incarnation)

    return [table.name for table in held.tables.values() if ends(table)]


def ended(held: Collection[ModelSpec], registers: Registers, wanted: Sequence[ModelSpec]) -> list[str]:
    """Names of the models that are here and, by these facts and incarnations, are so no more."""

    def ends(spec: ModelSpec) -> bool:
        newer = any(one.name == spec.name and one.incarnation > spec.incarnation for one in wanted)
        return newer or registers.is_dropped(Generation.of(spec))

    return [spec.name for spec in held if ends(spec)]


def alone(spec: ModelSpec, tables: Sequence[TableSpec], tensors: Sequence[TensorSpec]) -> ModelSpec:
    """The model with these tables and tensors only."""
    return replace(spec, tables={t.name: t for t in tables}, tensors={t.name: t for t in tensors})
