"""What a baseline or a witness does besides: its older state moves on (`ekko.delayed`).

A baseline's follows the current one at a fixed distance, but never shows what was found corrupted or was taken back, and is
what `ekko.Reader(run_dir=...)` finds there; the current one is in a folder below. A witness's follows what was judged
healthy, and readers of its run_dir find the current state. Neither is ever a leader, an inner node of a tree, or asked for
rows where others have them (R22).
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import structlog

from ekko.config import NodeConfig
from ekko.config.sections import NodeSection
from ekko.delayed.store import DelayedStore
from ekko.errors import ConfigError, ModelError, StoreError
from ekko.generations import Generation
from ekko.health.verdicts import Verdicts
from ekko.rollback.facts import Rollback, Rollbacks, Step
from ekko.store import Store
from ekko.store.model_store import ModelStore
from p2p.status import QueueStatus

# Unix milliseconds up to which the older state of a model is to be brought; None: not yet.
Bound = Callable[[ModelStore], int | None]

CURRENT_DIR = "current"  # below a baseline's run_dir, whose readers are to find the older state
HEALTHY_DIR = "healthy"  # below a witness's
LOG_DIR = "log"
# How often the older state moves on: a baseline is so much farther behind at most, a tenth of its delay where that is less.
TICK_S = 1.0
# Rows that are looked at before others have their turn on the event loop: some milliseconds.
SLICE_ROWS = 1 << 15
# A failure is told again after so long.
TELL_AGAIN_S = 60.0

log = structlog.get_logger(__name__)


def store_dir(node: NodeSection) -> Path:
    """Where the manifest of the node's own store is."""
    return node.run_dir / CURRENT_DIR if node.role == "baseline" else node.run_dir


def open_delayed(config: NodeConfig, current: Store, memory_dir: Path) -> DelayedStore | None:
    """The older state beside a node's store; None of a node that keeps none.

    Raises:
        StoreError: the disk or shared memory cannot be used.
    """
    node = config.node
    if not node.keeps_older_state:
        return None
    folder = node.run_dir if node.role == "baseline" else node.run_dir / HEALTHY_DIR
    older = Store.open(folder, memory_dir=memory_dir, access=node.access)
    older = older.narrowed({name: model.hold for name, model in current.models.items()})
    try:
        return DelayedStore.open(current, older, node.run_dir / LOG_DIR, node.log_bytes_max)
    except ModelError as error:  # what the node holds has another shape now, under the same name
        log.warning("older_state_dropped", reason=str(error))
        older.destroy()
        older = Store.open(folder, memory_dir=memory_dir, access=node.access)
        return DelayedStore.open(current, older, node.run_dir / LOG_DIR, node.log_bytes_max)


def check_role(node: NodeSection) -> None:
    """Refuse a folder in which a node of another role has its store: its readers would find something else.

    Raises:
        ConfigError: with the remedy.
    """
    was_baseline = (node.run_dir / CURRENT_DIR).is_dir()
    had_store = (node.run_dir / "manifest.json").exists()
    if (node.role == "baseline") != was_baseline and had_store:
        before = "a baseline" if was_baseline else "no baseline"
        raise ConfigError(
            f"node.role: the node in {node.run_dir} was {before} until now, and its store lies elsewhere there: give it "
            "an empty run_dir, from which it joins anew"
        )


class Delaying:
    """Moves the older state on until it is cancelled.

    Args:
        node: its section.
        delayed: both states.
        held_until: beyond this moment the older state of a model must not come now, Unix milliseconds; None: no such moment.
        clock_agrees: whether this node's clock is about right (R14). The older state never goes back, so one that a clock that
            was set an hour ahead had brought to the current state would stay there for an hour.
    """

    def __init__(
        self,
        node: NodeSection,
        delayed: DelayedStore,
        held_until: Callable[[Generation], int | None] = lambda _: None,
        clock_agrees: Callable[[], bool] = lambda: True,
    ) -> None:
        self.delayed = delayed
        self._held_until = held_until
        self._clock_agrees = clock_agrees
        self._node = node
        self._bound: Bound = self._healthy_until if node.role == "witness" else self._of_a_baseline
        self._complete = node.role != "baseline"  # the older state was whole once in this life
        self._told: dict[str, float] = {}  # monotonic, by reason
        self.failures = 0

    @property
    def served(self) -> Store:
        """What readers of run_dir see."""
        return self.delayed.older if self._node.role == "baseline" else self.delayed.current

    def _before_now(self, model: ModelStore) -> int | None:
        return _now_ms() - int(self._node.delay_s * 1000)

    def _of_a_baseline(self, model: ModelStore) -> int | None:
        """One delay ago; but the moment before a stretch that was corrupted or taken back, until all of that is old enough.

        Else a baseline would show one delay later what nobody is to see, and online would seem well beside it.
        """
        facts, generation = self.delayed.current.facts, Generation.of(model.spec)
        until_ms = now_ms = _now_ms()
        until_ms -= int(self._node.delay_s * 1000)
        taken = [(one.cut_ms, one.changed_ms if one.over else now_ms) for one in _taken_back(facts.of(Rollbacks), generation)]
        bad = [(one.from_ms - 1, one.until_ms) for one in facts.of(Verdicts).intervals(generation) if one.state == "corrupted"]
        for from_ms, over_ms in sorted([*taken, *bad], key=lambda one: one[1], reverse=True):
            if from_ms < until_ms < over_ms:
                until_ms = from_ms
        return until_ms

    def _healthy_until(self, model: ModelStore) -> int | None:
        """A moment of which the state is known, so that the older store never has anything but a state that was healthy."""
        healthy_ms = self.delayed.current.facts.of(Verdicts).healthy_until(Generation.of(model.spec), _now_ms())
        before_ms = self._before_now(model)
        held_ms = self._held_until(Generation.of(model.spec))
        if healthy_ms is None or before_ms is None:
            return self._unjudged(model, before_ms)
        wanted_ms = min(healthy_ms - 1, before_ms, before_ms if held_ms is None else held_ms)
        if self.delayed.lost(model.spec.name):
            return wanted_ms  # nothing is known until both stores were compared
        return self.delayed.valid_cut(model.spec.name, wanted_ms)

    def _unjudged(self, model: ModelStore, before_ms: int | None) -> int | None:
        """Nobody ever judged it: once half of the log is full, what is old enough moves on, rather than be given up."""
        judged = self.delayed.current.facts.of(Verdicts).judged_until(Generation.of(model.spec)) is not None
        if judged or before_ms is None or self.delayed.log.bytes < self.delayed.log.bytes_max // 2:
            return None
        self._tell(model.spec.name, "nobody judges it, and the log is half full: its older state follows the current one")
        return self.delayed.valid_cut(model.spec.name, before_ms)

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = TICK_S if self._node.role == "witness" else min(TICK_S, self._node.delay_s / 10)
        while True:
            await asyncio.sleep(pause_s)
            await self.move_on()

    async def move_on(self) -> None:
        """Bring the older states of all models to where they are to be by now."""
        if not self._clock_agrees():
            self._tell("", "this node's clock is not that of the others: the older state waits until it is right")
            return
        for name in list(self.delayed.current.models):
            try:
                await self._advance(name)
            except ModelError:
                continue  # it was dropped meanwhile
            except StoreError as error:
                self._tell(name, str(error))
        if self.served is self.delayed.older:
            self.delayed.older.settle_aliases(_now_ms() - int(self._node.delay_s * 1000))

    async def _advance(self, name: str) -> None:
        delayed = self.delayed
        delayed.follow_schema()
        model = delayed.current.models[name]
        until_ms = self._bound(model)
        if until_ms is not None:
            while not delayed.advance(name, until_ms, SLICE_ROWS):  # noqa: ASYNC110 - others have their turn
                await asyncio.sleep(0)
        delayed.collect(name, _now_ms())
        twin = delayed.older.models[name]
        if twin.traffic.bounds != model.traffic.bounds:  # readers of either ask which requests are whose
            twin.set_traffic(model.traffic)

    def _tell(self, model: str, reason: str) -> None:
        self.failures += 1
        if time.monotonic() - self._told.get(reason, -TELL_AGAIN_S) >= TELL_AGAIN_S:
            self._told = {reason: time.monotonic()}
            log.warning("older_state_stands_still", model=model, reason=reason)

    def waiting_for(self) -> list[str]:
        """What a baseline's older state lacks; asked once the node has caught up, and nothing any more once it was whole."""
        if self._complete:
            return []
        delay = f"what came when the node joined is there {self._node.delay_s:g} s later"
        lacking = [name for name in self.delayed.current.models if not self.delayed.is_whole(name)]
        self._complete = not lacking
        return [f"the delayed state of model {name!r}: {delay}" for name in lacking]

    def queue(self) -> QueueStatus:
        """How full the log is."""
        return QueueStatus("log_bytes", self.delayed.log.bytes, self.delayed.log.bytes_max)

    def to_json(self) -> dict[str, object]:
        """For /status and `ekko status`."""
        delayed = self.delayed
        return {
            "role": self._node.role,
            "delay_s": self._node.delay_s,
            "log": {
                "bytes": delayed.log.bytes,
                "bound": delayed.log.bytes_max,
                "files": len(delayed.log.segments),
                "pending_rows": delayed.log.pending_rows,
                **asdict(delayed.log.counters),
            },
            "losses": delayed.losses,
            "reason": delayed.reason,
            "failures": self.failures,
            "models": {name: asdict(picture) for name, picture in delayed.pictures().items()},
        }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _taken_back(rollbacks: Rollbacks, model: Generation) -> list[Rollback]:
    """Those that wrote, or are about to."""
    known = map(rollbacks.shown, rollbacks.of(model))
    return [one for one in known if one.cut_ms and not one.dry and one.step is not Step.FAILED]
