"""Up to which moment a baseline's older state moves: never into what was found corrupted, or was taken back."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ekko.delayed.store import DelayedStore
from ekko.generations import Generation
from ekko.health.verdicts import Verdicts
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.node import delaying
from ekko.rollback.facts import Rollback, Rollbacks, Step
from ekko.store import Store
from p2p.replica import RowColumns
from p2p.stamps import make_stamp

NOW_MS = 1_800_000_100_000
CTR = Generation("ctr")


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delaying, "_now_ms", lambda: NOW_MS)


def bound_s(verdicts: Verdicts, *rollbacks: Rollback, delay_s: float = 30.0) -> float | None:
    """Seconds before now."""
    known: dict[type, Any] = {Verdicts: verdicts, Rollbacks: Rollbacks().having(*rollbacks)}
    delayed = SimpleNamespace(current=SimpleNamespace(facts=SimpleNamespace(of=known.__getitem__)))
    one = delaying.Delaying(SimpleNamespace(role="baseline", delay_s=delay_s), delayed)  # type: ignore[arg-type]
    until_ms = one._bound(SimpleNamespace(spec=ModelSpec("ctr")))  # type: ignore[arg-type]
    return None if until_ms is None else (NOW_MS - until_ms) / 1_000


def rollback(cut_s: float, step: Step, changed_s: float, epoch: int = 1) -> Rollback:
    times = {"cut_ms": round(NOW_MS - cut_s * 1_000), "changed_ms": round(NOW_MS - changed_s * 1_000)}
    return Rollback(CTR, epoch, step, 0, NOW_MS - 60_000, "w", automatic=True, **times)


def test_a_baseline_follows_at_its_delay() -> None:
    assert bound_s(Verdicts()) == 30


def test_what_was_taken_back_is_never_shown() -> None:
    assert bound_s(Verdicts(), rollback(40, Step.DONE, 20)) == 40, "bad rows are old enough, those that were restored are not"
    assert bound_s(Verdicts(), rollback(40, Step.WAITING, 35)) == 40, "it goes on"
    assert bound_s(Verdicts(), rollback(60, Step.DONE, 31)) == 30, "and so are these, with them"
    assert bound_s(Verdicts(), rollback(20, Step.DONE, 10)) == 30
    assert bound_s(Verdicts(), rollback(40, Step.FAILED, 20)) == 30
    assert bound_s(Verdicts(), replace(rollback(40, Step.DONE, 20), dry=True)) == 30
    died = rollback(60, Step.WRITING, 58), rollback(60, Step.DONE, 31, epoch=2)
    assert bound_s(Verdicts(), *died) == 30, "another one took over from the first, of which nothing more will be heard"
    twice = rollback(45, Step.DONE, 35), rollback(40, Step.DONE, 20, epoch=2)
    assert bound_s(Verdicts(), *twice) == 45, "the second went back to a moment within the first"


def test_what_was_found_corrupted_is_not_shown_either() -> None:
    verdicts = Verdicts().note("ctr", "healthy", NOW_MS - 80_000, NOW_MS - 38_000)
    corrupted = verdicts.note("ctr", "corrupted", NOW_MS - 38_000, NOW_MS - 4_000)
    assert bound_s(corrupted) == pytest.approx(38, abs=0.01)
    assert bound_s(corrupted, delay_s=50.0) == 50
    assert bound_s(corrupted, delay_s=3.0) == 3
    assert bound_s(verdicts) == 30


def test_a_clock_that_is_wrong_brings_nothing_forward(tmp_path: Path) -> None:
    current, agrees = Store.anonymous(), [False]
    model = current.add_model(ModelSpec("ctr", 8, {"item": TableSpec("item", 2)}))
    delayed = DelayedStore.open(current, Store.anonymous(), tmp_path, 1 << 20)
    rows = np.ones((1, 2), np.float32).view(np.uint8)
    model.apply([RowColumns(table_id("item"), np.array([1], np.uint64), rows)], make_stamp(NOW_MS - 50_000, 0, 1))
    node = SimpleNamespace(role="baseline", delay_s=30.0)
    one = delaying.Delaying(node, delayed, clock_agrees=lambda: agrees[0])  # type: ignore[arg-type]
    for agreed, moved in ((False, False), (True, True)):
        agrees[0] = agreed
        asyncio.run(one.move_on())
        assert (delayed.oldest_cut("ctr") > 0) == moved
    assert one.failures == 1
    delayed.log.close()
