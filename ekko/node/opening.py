"""The store of a node at its start: as it was left, or as a snapshot has it, or empty; with what the configuration names.

Only here does a difference between the configuration and what is stored come to light. What can be followed is followed (a
partition is not to be held any more, a model was dropped), and told; what contradicts is refused.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from ekko.config.sections import ModelSection, NodeConfig, ServerModelSection
from ekko.errors import ConfigError, ModelError
from ekko.generations import Generation
from ekko.model import is_training, training_name
from ekko.node.delaying import store_dir
from ekko.snapshots.folders import Folder, open_folder
from ekko.snapshots.load import Wanted, open_or_restore
from ekko.snapshots.service import SnapshotService
from ekko.store import Store
from ekko.store.capacity import Capacity, header_bytes
from ekko.store.model_store import ModelStore

log = structlog.get_logger(__name__)


async def open_store(
    config: NodeConfig, memory_dir: Path, snapshots: SnapshotService | None, tell: Callable[[str], None]
) -> Store:
    """The store as it was left, or as a snapshot has it, without the partitions that are not to be held any more.

    Args:
        config: of the node.
        memory_dir: a tmpfs.
        snapshots: where it may be restored from; None: nothing may be restored.
        tell: called, in a thread, with how far a snapshot is loaded.

    Raises:
        StoreError: shared memory cannot be used.
    """
    stop = threading.Event()
    try:
        store = await asyncio.to_thread(_attach_or_restore, config, memory_dir, snapshots, tell, stop)
    finally:
        stop.set()  # a thread cannot be cancelled; it looks at this
    hold = {}
    for name, model in config.models.items():
        left = store.models.get(name)
        if left is not None and left.spec.partitions == model.partitions:  # otherwise it is refused in a moment
            hold[name] = model.held
            if dropped := sorted(set(left.hold) - set(model.held)):
                log.warning("partitions_dropped", model=name, partitions=dropped)
    servers = {} if config.server is None else {training_name(name): model for name, model in config.server.models.items()}
    for name, left in store.models.items():
        if is_training(name) and left.spec.partitions > 1 and name not in config.models:
            hold[name] = servers[name].held if name in servers else ()
            if dropped := sorted(set(left.hold) - set(hold[name])):
                log.warning("partitions_dropped", model=name, partitions=dropped)
    return store.narrowed(hold)


def _attach_or_restore(
    config: NodeConfig, memory_dir: Path, snapshots: SnapshotService | None, tell: Callable[[str], None], stop: threading.Event
) -> Store:
    """In a thread: 100 GB take minutes, and /healthz answers meanwhile."""
    run_dir, access = store_dir(config.node), config.node.access
    if snapshots is None:
        return Store.open(run_dir, memory_dir=memory_dir, access=access)
    places = [snapshots.picture.url]
    if config.snapshots is not None and config.snapshots.seed is not None:
        places.append(config.snapshots.seed)
    folders: list[Folder] = [open_folder(url) for url in places]
    specs = {name: model.spec(name) for name, model in config.models.items()}
    wanted = Wanted(specs, {name: model.held for name, model in config.models.items()}, config.node.id)

    def progress(done: int, total: int) -> None:
        tell(f"a snapshot: {done * 100 // max(1, total)} % of {total} bytes are loaded")

    begin = time.monotonic()
    restored = open_or_restore(run_dir, folders, wanted, memory_dir=memory_dir, access=access, progress=progress, stop=stop)
    for reason in restored.refused:
        log.warning("snapshot_refused", reason=reason)
    if restored.snapshot is not None:
        seconds = round(time.monotonic() - begin, 3)
        log.info("snapshot_restored", snapshot=restored.snapshot, url=restored.url, bytes=restored.bytes, seconds=seconds)
    snapshots.restored(restored.snapshot or "", restored.created_ms, tuple(restored.refused))
    return restored.store


def have_configured_models(config: NodeConfig, store: Store) -> None:
    """Have every model that the configuration names, but those that were dropped.

    Raises:
        ConfigError: one contradicts what is stored, or may take less than it needs without any row.
    """
    for name, model in config.models.items():
        if model.capacity_bytes is not None:
            store.limit(name, Capacity(model.capacity_bytes, model.evict if model.when_full == "evict" else None))
        if name not in store.models and name in store.registers.dropped:
            log.warning("model_was_dropped", model=name, remedy=f"remove [models.{name}] from the configuration")
            continue
        wanted = store.current(model.spec(name))
        generation = Generation.of(wanted)
        tables = {name: one for name, one in wanted.tables.items() if not store.registers.next_table(generation, name)}
        for table in wanted.tables.keys() - tables.keys():
            # What has the name by now, if anything, is whoever's who began it.
            log.warning("table_was_dropped", model=name, table=table, remedy=f"remove it from [models.{name}]")
        try:
            held = store.add_model(replace(wanted, tables=tables), model.capacity_rows, model.held)
        except ModelError as error:
            if name in store.registers.dropped:  # what is configured was dropped, and another one has its name
                log.warning("model_was_dropped", model=name, remedy=f"change [models.{name}]", reason=str(error))
                continue
            raise ConfigError(f"models.{name}: {error}: change the configuration, or remove {config.node.run_dir}") from None
        _check_capacity(name, model, held)
    if config.server is not None:
        for name, section in config.server.models.items():
            _have_trained_model(config, name, section, store)
    for name, held in store.models.items():
        if shards := held.begin_anew():
            log.info("shards_begun_anew", model=name, shards=shards)


def _have_trained_model(config: NodeConfig, name: str, section: ServerModelSection, store: Store) -> None:
    """Have what servers keep of a model, and the model that is served of it.

    Raises:
        ConfigError: either contradicts what is stored.
    """
    from ekko.train.server.schema import training_spec

    served = config.models.get(name, ModelSection())
    tables = {table: one.spec(table, served.codec) for table, one in section.tables.items()}
    wanted = training_spec(name, section, served.shards), replace(served.spec(name), tables=tables)
    for spec, hold in zip(wanted, (section.held, served.held), strict=True):
        if spec.name in store.registers.dropped and spec.name not in store.models:
            log.warning("model_was_dropped", model=spec.name, remedy=f"remove [server.models.{name}] from the configuration")
            continue
        try:
            store.add_model(store.current(spec), served.capacity_rows, hold)
        except ModelError as error:
            remedy = f"change the configuration, or remove {config.node.run_dir}"
            raise ConfigError(f"server.models.{name}: {error}: {remedy}") from None


def _check_capacity(name: str, model: ModelSection, held: ModelStore) -> None:
    if model.capacity_bytes is None:
        return
    if model.capacity_bytes < (least := header_bytes(held)):
        raise ConfigError(
            f"models.{name}.capacity_bytes: {model.capacity_bytes} bytes, and {held.shards} shards take {least} "
            "without any row: allow the model more, or give it fewer shards"
        )
    if held.memory_bytes > model.capacity_bytes:
        log.warning("capacity_exceeded", model=name, bytes=held.memory_bytes, capacity_bytes=model.capacity_bytes)
