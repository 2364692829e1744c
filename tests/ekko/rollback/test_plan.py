"""The plan: whole or not at all, and the same when it is read again."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from ekko.errors import StoreError
from ekko.generations import Generation
from ekko.rollback.moments import show_moment
from ekko.rollback.plan import FilePlans, MemoryPlans, PlanBatch, Plans, PlanWriter, RowsAtRisk, Summary, read_plan, write_plan
from ekko.rollback.risk import KEPT_MAX, decode_risk, encode_risk, risk_picture
from p2p.stamps import EPOCH_MS, make_stamp

CTR = Generation("ctr", 2)


def batch(table: int, live: int, deleted: int) -> PlanBatch:
    keys = np.arange(live + deleted, dtype=np.uint64) * 7
    return PlanBatch(table, keys, np.arange(live * 16, dtype=np.uint8).reshape(live, 16), keys + 1)


PIECES = [batch(1, 3, 2), None, batch(9, 0, 4), RowsAtRisk(9, np.arange(3, dtype=np.uint64), np.arange(3, dtype=np.uint64))]


@pytest.fixture(params=["files", "memory"])
def plans(request: pytest.FixtureRequest, tmp_path: Path) -> Plans:
    return FilePlans(tmp_path / "rollback") if request.param == "files" else MemoryPlans()


def write(plans: Plans, epoch: int = 5) -> Summary:
    *_, summary = write_plan(PlanWriter(plans, CTR, epoch, 1_000), iter(PIECES))
    assert summary is not None
    return summary


def test_a_plan_is_read_as_it_was_written(plans: Plans) -> None:
    assert read_plan(plans, CTR) is None
    summary = write(plans)
    plan = read_plan(plans, CTR)
    assert plan is not None
    assert (plan.epoch, plan.summary) == (5, summary)
    assert summary == Summary(1_000, 2, 9, 6, 9 * 8 + 3 * 16, 3)
    for index, wanted in enumerate((batch(1, 3, 2), batch(9, 0, 4))):
        found = plan.batch(index)
        assert found.table == wanted.table
        assert np.array_equal(found.keys, wanted.keys)
        assert found.rows.tobytes() == wanted.rows.tobytes()
        assert len(found.rows) == len(wanted.rows)
        assert np.array_equal(found.expected, wanted.expected)
    assert plan.at_risk[0].keys.tolist() == [0, 1, 2]
    plan.close()
    plans.drop(CTR)
    assert read_plan(plans, CTR) is None


def test_half_a_plan_is_none(plans: Plans) -> None:
    steps: Iterator[object] = write_plan(PlanWriter(plans, CTR, 5, 1_000), iter(PIECES))
    for _ in range(len(PIECES)):
        next(steps)
        assert read_plan(plans, CTR) is None
    next(steps)
    plan = read_plan(plans, CTR)
    assert plan is not None
    plan.close()


def test_an_attempt_leaves_the_plan_of_before(plans: Plans) -> None:
    write(plans, epoch=5)
    steps = write_plan(PlanWriter(plans, CTR, 6, 1_000), iter(PIECES))
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    plan = read_plan(plans, CTR)
    assert plan is not None
    assert plan.epoch == 5
    plan.close()


def test_every_damaged_byte_is_noticed() -> None:
    plans = MemoryPlans()
    write(plans)
    whole = plans.committed[CTR]
    for at in range(0, len(whole), 3):
        plans.committed[CTR] = whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]
        assert read_plan(plans, CTR) is None, at
    for size in range(0, len(whole), 5):
        plans.committed[CTR] = whole[:size]
        assert read_plan(plans, CTR) is None, size


def test_a_plan_of_another_model_is_none(plans: Plans) -> None:
    write(plans)
    assert read_plan(plans, Generation("ctr", 1)) is None


class FullDisk(FilePlans):
    """Nothing more goes onto it."""

    def begin(self, model: Generation) -> BinaryIO:
        super().begin(model).close()
        return open("/dev/full", "w+b")  # noqa: PTH123 - as a disk is


def test_a_full_disk_is_said_so_and_nothing_stays_on_it(tmp_path: Path) -> None:
    plans = FullDisk(tmp_path / "rollback")
    write(FilePlans(tmp_path / "rollback"), epoch=4)
    many = [batch(1, 30_000, 0)] * 3
    with pytest.raises(StoreError, match="cannot be written: No space left on device: free some room"):
        list(write_plan(PlanWriter(plans, CTR, 5, 1_000), iter(many)))
    with pytest.raises(StoreError, match="free some room"):  # found out only when it is synced
        list(write_plan(PlanWriter(plans, CTR, 5, 1_000), iter([])))
    assert [path.name for path in (tmp_path / "rollback").iterdir()] == ["ctr#2.plan"]
    with pytest.raises(StoreError, match=r"cannot be written: \w+"):
        list(write_plan(PlanWriter(FilePlans(tmp_path / "rollback" / "ctr#2.plan"), CTR, 5, 1_000), iter([])))


def test_of_the_last_rollbacks_the_rows_at_risk_are_kept(plans: Plans) -> None:
    rows = RowsAtRisk(9, np.array([7, 2**64 - 1], np.uint64), np.array([make_stamp(EPOCH_MS + 5, 0, 1), 0], np.uint64))
    other = Generation("ctr", 3)
    plans.keep(other, 1, b"", KEPT_MAX)
    for epoch in range(1, KEPT_MAX + 3):
        plans.keep(CTR, epoch, encode_risk([rows]), KEPT_MAX)
    assert [epoch for epoch in range(20) if plans.kept(CTR, epoch) is not None] == list(range(3, KEPT_MAX + 3))
    assert plans.kept(other, 1) == b""
    kept = plans.kept(CTR, 5)
    assert kept is not None
    assert risk_picture(decode_risk(kept), {9: "item"}) == [
        {"table": "item", "key": "7", "written": show_moment(EPOCH_MS + 5)},
        {"table": "item", "key": str(2**64 - 1), "written": None},
    ]
    assert decode_risk(kept[:-1]) == []
    plans.drop(CTR)
    assert plans.kept(CTR, 5) == kept
