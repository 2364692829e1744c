"""Each clause of R1, R2, R3, R16, R18 and T2 is switched off on purpose; a scenario that passes as it is must notice."""

from typing import Any

import numpy as np
import pytest

from p2p import messages as m
from p2p.arrivals import Arrivals
from p2p.busy import feeds, state_mode
from p2p.busy.backlog import Backlog, Cycle
from p2p.busy.due import DueRows, Taken
from p2p.busy.feeds import Feeds
from p2p.busy.state_mode import StateMode
from p2p.core import Keyspace
from p2p.errors import RemoteProtocolError
from p2p.link.links import Arrival, Link
from p2p.pulling import intake
from p2p.pushing import push
from p2p.replica import RowColumns, Selection
from sim_cluster.checkers import Watch
from sim_cluster.network import LinkOptions, NetworkOptions
from tests.p2p.backlog_chaos import (
    backlog_of,
    congested_under_faults,
    fill,
    fill_checked,
    little_credit,
    pair,
    settle,
)
from tests.p2p.plants import Plant, Scenario, expect_caught

SEEDS = 6


def overloaded(seed: int) -> None:
    """One link carries less than is written: what is claimed is true, nothing is pulled, and batches come back."""
    with little_credit(1_500):
        cluster = pair(seed)
        watch, node = Watch(cluster), cluster.nodes["eu1"]
        assert node.machine is not None
        pulls, frontiers = node.machine.counters.pulls_started, set[int]()
        for step in range(100):
            fill(cluster, 2, keys=120 + seed)
            frontiers.add(int(node.store.models["ctr"].frontier.max()))
            problem = watch.check()
            assert not problem, f"seed {seed}, step {step}: {problem}"
        assert backlog_of(cluster, "t1", "eu1") is not None, f"seed {seed}: the link is not in state mode"
        assert len(frontiers) > 5, f"seed {seed}: nothing is claimed while the link is in state mode"
        trainer = cluster.nodes["t1"].machine
        assert trainer is not None
        assert trainer.counters.backlogs_begun == 1, f"seed {seed}: state mode was left while rows were due"
        settle(cluster, watch)
        assert node.machine.counters.pulls_started == pulls, f"seed {seed}: what was queued was pulled, too"


def long_cycles(seed: int) -> None:
    """A cycle takes many heartbeats, which all say that the child is behind: it lets what is queued come."""
    with little_credit(1_500):
        cluster = pair(seed, rate=3.0)
        node = cluster.nodes["eu1"]
        assert node.machine is not None
        pulls = node.machine.counters.pulls_started
        fill(cluster, 260, keys=400, every_ms=30)
        assert backlog_of(cluster, "t1", "eu1") is not None, f"seed {seed}: the link is not in state mode"
        assert node.machine.counters.pulls_started == pulls, f"seed {seed}: what was queued was pulled, too"


def lossy(seed: int) -> None:
    """The same on a link that loses chunks."""
    with little_credit(1_500):
        cluster = pair(seed)
        watch = Watch(cluster)
        cluster.options = NetworkOptions(1, 5, links={"eu/home": LinkOptions(10, 3.0, loss_probability=0.1)})
        fill_checked(cluster, watch, 80, keys=160)
        settle(cluster, watch)


def sockets_are_full(seed: int) -> None:
    """The sender's own transport does not take some chunks, which only the sender knows."""
    with little_credit(1_500), pytest.MonkeyPatch.context() as patch:
        cluster = pair(seed)
        watch, network = Watch(cluster), cluster.post.network
        arrivals, asked = network.arrivals, 0

        def some(*args: Any) -> list[int] | None:
            nonlocal asked
            chunk = backlog_of(cluster, "t1", "eu1") is not None and args[1][0] == "t1" and args[3] > 300
            asked += chunk
            return None if chunk and asked % 7 == 5 else arrivals(*args)

        patch.setattr(network, "arrivals", some)
        fill_checked(cluster, watch, 100, keys=120)
        assert asked > 20, f"seed {seed}: the scenario proves nothing"
        patch.undo()
        settle(cluster, watch)


def chunks_are_refused(seed: int) -> None:
    """A chunk does not fit, for whatever reason; the claim behind it must not be taken."""
    refused = 0

    def check(keyspace: Keyspace, columns: object, stamps: object, now: m.Now) -> None:
        nonlocal refused
        refused += 1
        if refused % 4 == 2:
            raise RemoteProtocolError("planted")

    with little_credit(1_500), pytest.MonkeyPatch.context() as patch:
        cluster = pair(seed)
        patch.setattr(feeds, "check_rows", check)
        watch = Watch(cluster)
        fill_checked(cluster, watch, 160, keys=60)
        assert refused > 5, f"seed {seed}: the scenario proves nothing"
        patch.undo()
        settle(cluster, watch)


def a_slot_is_reused_while_it_is_due(seed: int) -> None:
    """A row that the child has is due once more, is collected, and its slot is another key's (R18)."""
    with little_credit(1_500):
        cluster = pair(seed)
        watch, trainer = Watch(cluster), cluster.nodes["t1"]
        machine, replica = trainer.machine, trainer.store.models["ctr"]
        assert machine is not None
        fill(cluster, 1)
        table = cluster.model.tables["item"].id
        cluster.run(1_000)
        fill(cluster, 60, keys=200)
        assert backlog_of(cluster, "t1", "eu1") is not None
        cluster.options = NetworkOptions(1, 5)
        assert cluster.run_until(lambda: machine._state_mode.rows_max() == 0, 5_000, 5)
        backlog = backlog_of(cluster, "t1", "eu1")
        assert backlog is not None, f"seed {seed}: the scenario proves nothing"
        cluster.options = NetworkOptions(1, 5, links={"eu/home": LinkOptions(200)})
        keys = np.array([3], np.uint64)
        place = replica.places_of(table, keys)
        backlog.note(RowColumns(table, keys, np.empty((0, 0), np.uint8)), place, cluster.now_ms)  # as a repeat would
        replica.remove(table, place, complete=True)
        cluster.history = [write for write in cluster.history if (write.table, write.key) != ("item", 3)]
        cluster.publish("t1", "item", [9_999], 7.0)
        assert int(replica.places_of(table, np.array([9_999], np.uint64))[0]) & 0xFFFFFFFF == int(place[0]) & 0xFFFFFFFF
        for _ in range(40):
            cluster.run(50)
            problem = watch.check()
            assert not problem, f"seed {seed}: {problem}"


def what_matters_more_never_ends(seed: int) -> None:
    """Significant rows come faster than the link carries them: the recorded cycle ends all the same (R16)."""
    rows, number = DueRows(), 1_000
    rows.add(1, 16, np.arange(50), np.full(50, 1, np.uint8), 0)
    rows.record()
    for step in range(60):
        rows.add(1, 16, np.arange(number, number + 20), np.full(20, 200, np.uint8), step)
        number += 20
        rows.take(10 * 33)
        if not rows.recorded:
            return
    raise AssertionError(f"seed {seed}: {rows.recorded} rows of the cycle still wait")


@pytest.mark.parametrize("seed", range(1))
def test_nothing_is_claimed_that_is_not_there(seed: int) -> None:
    congested_under_faults(seed)


SCENARIOS: list[Scenario] = [
    overloaded,
    long_cycles,
    lossy,
    sockets_are_full,
    chunks_are_refused,
    a_slot_is_reused_while_it_is_due,
    what_matters_more_never_ends,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: Scenario) -> None:
    scenario(0)


# --- the rules, switched off ------------------------------------------------------------------------------------------------


def claims_cover_shards_of_others(patch: pytest.MonkeyPatch) -> None:
    """R1: claims cover what another parent sends."""
    take = Backlog.take_pairs

    def all_of_it(self: Backlog, pairs: state_mode.Pairs) -> None:
        take(self, pairs)
        self.grid = np.ones_like(self.grid)

    patch.setattr(Backlog, "take_pairs", all_of_it)


def nobody_looks_whose_parent_we_are(patch: pytest.MonkeyPatch) -> None:
    """R1: the view gives a pair another parent, and the backlog stays."""
    patch.setattr(StateMode, "_is_parent", lambda self, backlog: True)


def entering_selects_nothing(patch: pytest.MonkeyPatch) -> None:
    """R2: what changed since the child's vector is not due."""

    def select(self: Backlog, selections: list[Selection], now_ms: int) -> None:
        pass

    patch.setattr(Backlog, "select", select)


def what_is_pulled_is_not_due(patch: pytest.MonkeyPatch) -> None:
    """R2: rows that came by a pull, or by a chunk, are not due."""
    patch.setattr(intake, "note_rows", lambda *_: None)


def what_is_published_is_not_due(patch: pytest.MonkeyPatch) -> None:
    """R2: rows that came by a batch, or were written here, are not due."""
    patch.setattr(push, "note_rows", lambda *_: None)


def a_backlog_survives_its_session(patch: pytest.MonkeyPatch) -> None:
    """R3: chunks were lost with a session, and the backlog goes on."""
    patch.setattr(StateMode, "on_session_ended", lambda self, link: None)


def claims_behind_a_hole_count(patch: pytest.MonkeyPatch) -> None:
    """R3: a claim is taken though a chunk before it is missing."""
    take = Arrivals.take

    def lenient(self: Arrivals, link: Link, envelope: m.Envelope, rows: m.Rows) -> Arrival:
        arrival = take(self, link, envelope, rows)
        return Arrival.NEXT if arrival is Arrival.BROKEN else arrival

    patch.setattr(Arrivals, "take", lenient)
    patch.setattr(Feeds, "spoil", lambda self, link: None)


def refused_chunks_do_not_matter(patch: pytest.MonkeyPatch) -> None:
    """R3: a claim is taken though a chunk before it was refused."""
    patch.setattr(Feeds, "_spoil", lambda self, feed: None)


def a_row_leaves_for_good(patch: pytest.MonkeyPatch) -> None:
    """R3: a row that changes after it was read, and before the claim, is not due again."""
    add, leave = DueRows.add, DueRows._leave
    left: dict[int, set[int]] = {}

    def once(self: DueRows, table: int, row_bytes: int, places: np.ndarray, classes: np.ndarray | None, now_ms: int) -> int:
        fresh = np.array([place not in left.get(id(self), ()) for place in places.tolist()], np.bool_)
        return add(self, table, row_bytes, places[fresh], None if classes is None else classes[fresh], now_ms)

    def leaving(self: DueRows, tables: np.ndarray, places: np.ndarray, taken: list[Taken]) -> int:
        left.setdefault(id(self), set()).update(places.tolist())
        if not self.recorded:
            left[id(self)].clear()
        return leave(self, tables, places, taken)

    patch.setattr(DueRows, "add", once)
    patch.setattr(DueRows, "_leave", leaving)


def batches_go_out_in_state_mode(patch: pytest.MonkeyPatch) -> None:
    """R16: batches go out beside the rows of the backlog."""
    patch.setattr(StateMode, "takes", lambda self, link, keyspace: False)


def what_is_queued_is_pulled(patch: pytest.MonkeyPatch) -> None:
    """R16: the child pulls what is queued for it."""
    patch.setattr(Keyspace, "fed_with", lambda self, writer, now_ms: False)
    patch.setattr(Keyspace, "is_fed", lambda self, now_ms: False)


def nothing_leaves_in_order(patch: pytest.MonkeyPatch) -> None:
    """R16: all bytes serve priority."""

    def significant_first(self: DueRows) -> list[int]:
        bands = [band for band, queue in enumerate(self._queues) if len(queue)]
        return [band for band in bands if band >= 8] or bands

    patch.setattr(DueRows, "_waiting", significant_first)


def state_mode_ends_while_rows_are_due(patch: pytest.MonkeyPatch) -> None:
    """R16: batches pass through again before the backlog has left."""

    patch.setattr(StateMode, "_look_after", lambda self, backlog: bool(backlog.request) and backlog.chunks > 3)


def rows_that_are_gone_do_not_matter(patch: pytest.MonkeyPatch) -> None:
    """R18: a row that was due is not in its slot any more, and the cycle is claimed."""
    read = StateMode._read

    def whole(self: StateMode, backlog: Backlog, taken: list[Taken]) -> tuple[RowColumns, ...]:
        columns = read(self, backlog, taken)
        backlog.torn = False
        return columns

    patch.setattr(StateMode, "_read", whole)
    patch.setattr(Backlog, "is_below_floor", lambda self: False)


def the_vector_is_read_when_it_is_claimed(patch: pytest.MonkeyPatch) -> None:
    """T2: what is claimed is our vector of now, and not the one that was recorded with what was due."""
    emit = StateMode._emit

    def late(self: StateMode, one: Backlog, columns: tuple[RowColumns, ...], *, claims: bool, ends: bool) -> None:
        if claims and one.cycle is not None:
            writers = one.cycle.writers
            knowledge = one.keyspace.knowledge
            one.cycle = Cycle(writers, knowledge.vector[:, writers], one.grid, knowledge.frontier[writers])
        emit(self, one, columns, claims=claims, ends=ends)

    patch.setattr(StateMode, "_emit", late)


def claims_are_made_when_the_first_rows_have_left(patch: pytest.MonkeyPatch) -> None:
    """T2: V is claimed before all that was recorded has been sent."""
    take = DueRows.take

    def hasty(self: DueRows, bytes_max: int) -> list[Taken]:
        taken = take(self, bytes_max)
        self.recorded = 0
        for held in self._tables:
            held.state[held.state != 0] = self._cycle
        return taken

    patch.setattr(DueRows, "take", hasty)


PLANTS: list[tuple[Plant, Scenario]] = [
    (claims_cover_shards_of_others, congested_under_faults),
    (nobody_looks_whose_parent_we_are, congested_under_faults),
    (entering_selects_nothing, overloaded),
    (what_is_pulled_is_not_due, congested_under_faults),
    (what_is_published_is_not_due, overloaded),
    (a_backlog_survives_its_session, sockets_are_full),
    (claims_behind_a_hole_count, lossy),
    (refused_chunks_do_not_matter, chunks_are_refused),
    (a_row_leaves_for_good, overloaded),
    (batches_go_out_in_state_mode, overloaded),
    (what_is_queued_is_pulled, long_cycles),
    (nothing_leaves_in_order, what_matters_more_never_ends),
    (state_mode_ends_while_rows_are_due, overloaded),
    (rows_that_are_gone_do_not_matter, a_slot_is_reused_while_it_is_due),
    (the_vector_is_read_when_it_is_claimed, overloaded),
    (claims_are_made_when_the_first_rows_have_left, overloaded),
]


@pytest.mark.parametrize(("plant", "scenario"), PLANTS, ids=lambda item: item.__name__)
def test_a_planted_bug_is_caught(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)
