"""When a link goes into state mode, what leaves it meanwhile, and when batches pass again (decision 0042).

Each rule is switched off on purpose; a scenario that passes as it is must notice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest

from ekko.codec import encode
from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.busy import state_mode
from p2p.busy.backlog import CALM_MS, TOLD_MS_MAX, Backlog
from p2p.busy.pairs import Pairs
from p2p.busy.state_mode import StateMode
from p2p.classes import SIGNIFICANT
from p2p.link.links import Link
from p2p.pushing import push, waiting
from p2p.pushing.waiting import WaitingLine
from p2p.replica import RowColumns
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import backlog_of, little_credit
from tests.p2p.plants import Plant, Scenario, expect_caught

MODEL = ModelSpec("ctr", 8, {"item": TableSpec("item", 96)})
OTHER = ModelSpec("cvr", 8, {"item": TableSpec("item", 96)})
TABLE = MODEL.tables["item"]
# So that one row is one millisecond of the budget.
RATE = 1_000.0 * (TABLE.row_bytes + 16)
WAVES_MS = 3_000


def joined(delay_ms: int = 5, serving: int = 1, more: Sequence[ModelSpec] = ()) -> VirtualCluster:
    """A trainer, and nodes of another region, towards which there is a rate."""
    links = {"eu/home": LinkOptions(delay_ms)}
    cluster = VirtualCluster(1, NetworkOptions(1, 1, links=links), MODEL, more)
    cluster.add("t1", "home", "train")
    for number in range(1, serving + 1):
        cluster.add(f"eu{number}", "eu", seeds=["t1"])
    cluster.run(3_000)
    write(cluster, 1)
    cluster.run(500)
    cluster.set_rate("eu", "home", RATE)
    cluster.run(500)
    return cluster


def write(
    cluster: VirtualCluster, rows: int, first: int = 0, value: float = 0.0, significant: int = 0, model: ModelSpec = MODEL
) -> None:
    """A step of so many rows, of which the first ones are significant."""
    keys, classes = np.arange(first, first + rows, dtype=np.uint64), np.full(rows, 20, np.uint8)
    classes[:significant] = SIGNIFICANT + 20
    encoded = encode(TABLE.codec, np.full((rows, TABLE.dim), value, np.float32))
    columns = (RowColumns(TABLE.id, keys, encoded, priority=classes),)
    cluster.ask("t1", lambda request: m.PublishRequested(request, model.id, columns))


def state_of(cluster: VirtualCluster) -> Backlog | None:
    """State mode from the trainer towards the other region."""
    found = [backlog_of(cluster, "t1", name) for name in cluster.nodes if name != "t1"]
    return next((one for one in found if one is not None), None)


def enter(cluster: VirtualCluster) -> Backlog:
    """By a batch that takes too long; until all of it has left."""
    write(cluster, 100)
    backlog = state_of(cluster)
    assert backlog is not None, "the scenario proves nothing"
    assert cluster.run_until(lambda: bool(backlog.request) and not backlog.due.rows, 3_000, 5)
    return backlog


def left_after_ms(cluster: VirtualCluster, limit_ms: int) -> int:
    """How long until batches pass again."""
    begin_ms = cluster.now_ms
    assert cluster.run_until(lambda: state_of(cluster) is None, limit_ms, 5), f"still in state mode after {limit_ms} ms"
    return cluster.now_ms - begin_ms


@contextmanager
def short_waves() -> Iterator[None]:
    with mock.patch.object(state_mode, "WAVES_MS", WAVES_MS):
        yield


# --- entering


def a_batch_that_takes_too_long_does_not_pass(_seed: int) -> None:
    cluster = joined()
    write(cluster, push.PASS_MS_MAX - 10)
    assert state_of(cluster) is None, "it would have passed in time"
    cluster.run(1_000)
    write(cluster, push.PASS_MS_MAX + 10)
    assert state_of(cluster) is not None


def batches_that_together_take_too_long_do_not_pass(_seed: int) -> None:
    cluster = joined()
    write(cluster, push.PASS_MS_MAX - 15)
    cluster.run(20)
    assert state_of(cluster) is None, "it would have passed in time"
    write(cluster, push.PASS_MS_MAX - 15)
    assert state_of(cluster) is not None


def a_link_that_suffices_passes_batches(_seed: int) -> None:
    cluster = joined()
    for step in range(40):
        write(cluster, 40, value=step)
        cluster.run(50)
        assert state_of(cluster) is None


def without_a_rate_a_short_line_waits_a_moment(_seed: int) -> None:
    """Acknowledgements take 400 ms: a batch that finds no credit waits for so long, and 150 ms more; then rows are due."""
    with little_credit(4_000), mock.patch.object(push, "SHORT_BYTES_MAX", waiting.SHORT_BYTES_MAX):
        cluster = joined(delay_ms=200)
        cluster.set_rate("eu", "home", None)
        cluster.run(500)
        for _ in range(2):  # these are all that may be on its way
            write(cluster, 12)
            cluster.run(20)
        until_ms = cluster.now_ms + 400 + waiting.SHORT_MS_MAX
        while cluster.now_ms < until_ms - 20:  # many more than the credit that comes back
            write(cluster, 12)
            assert state_of(cluster) is None, "it has not waited long"
            cluster.run(20)
        cluster.run(40)
        write(cluster, 12)
        assert state_of(cluster) is not None


# --- while it is entered


def what_matters_goes_ahead(_seed: int) -> None:
    """A link of 100 ms each way goes into state mode: the significant rows of its batch and of the next one do not wait."""
    cluster = joined(delay_ms=100)
    store = cluster.nodes["eu1"].store.models["ctr"]

    def shows(key: int) -> bool:
        place = store.places_of(TABLE.id, np.array([key], np.uint64))
        expected = encode(TABLE.codec, np.full((1, TABLE.dim), 7, np.float32))
        return int(place[0]) >= 0 and store.read(TABLE.id, place).rows.tobytes() == expected.tobytes()

    write(cluster, 200, first=1_000, value=7.0, significant=1)
    assert state_of(cluster) is not None, "the scenario proves nothing"
    cluster.run(20)
    write(cluster, 1, first=2_000, value=7.0, significant=1)
    cluster.run(130)
    assert shows(1_000), "of the batch that did not pass"
    assert shows(2_000), "of a step that came while the child was asked"
    assert not shows(1_100), "the scenario proves nothing"
    assert cluster.run_until(lambda: shows(1_100), 2_000, 5)


def who_does_not_tell_its_vector_is_left_to_pull(_seed: int) -> None:
    """A child hears us, and we hear of it only from others: so it is after ten seconds, though a session ended meanwhile."""
    cluster = joined(serving=2)
    trainer = cluster.nodes["t1"].machine
    assert trainer is not None
    write(cluster, 1)
    (child,) = [link.node for link in trainer._core.links.values() if link.waits_for_ack]
    cluster.cut.add((child, "t1"))
    cluster.run(TOLD_MS_MAX // 2)
    write(cluster, 100)
    backlog = state_of(cluster)
    assert backlog is not None, "the scenario proves nothing"
    session = backlog.link.session_out
    assert cluster.run_until(lambda: state_of(cluster) is None, TOLD_MS_MAX + 500), "it is waited for"
    assert backlog.link.session_out > session, "the scenario proves nothing"
    assert trainer.counters.backlogs_refused == 1


# --- leaving


def it_is_left_when_it_was_calm(_seed: int) -> None:
    cluster = joined()
    enter(cluster)
    assert CALM_MS - 20 <= left_after_ms(cluster, 2 * CALM_MS) <= CALM_MS + 100


def it_is_not_left_before_all_is_acknowledged(_seed: int) -> None:
    cluster = joined(delay_ms=500)
    backlog = enter(cluster)
    sequence = backlog.link.sequence_out
    left_after_ms(cluster, 3_000)
    assert backlog.link.sequence_acknowledged >= sequence


def load_in_waves(_seed: int) -> None:
    with short_waves():
        cluster = joined()
        enter(cluster)
        left_after_ms(cluster, 2_000)
        cluster.run(WAVES_MS // 2)
        enter(cluster)
        assert WAVES_MS - 20 <= left_after_ms(cluster, 2 * WAVES_MS) <= WAVES_MS + 100


def a_wave_long_ago(_seed: int) -> None:
    with short_waves():
        cluster = joined()
        enter(cluster)
        left_after_ms(cluster, 2_000)
        cluster.run(WAVES_MS + 100)
        enter(cluster)
        assert left_after_ms(cluster, 2 * WAVES_MS) <= CALM_MS + 100


def load(cluster: VirtualCluster, every_ms: int, duration_ms: int, each: Callable[[], None] = lambda: None) -> bool:
    """Steps of 20 ms of the budget; whether state mode outlived them."""
    for step in range(duration_ms // every_ms):
        write(cluster, 20, value=step)
        each()
        cluster.run(every_ms)
    return state_of(cluster) is not None


def whole_batches_would_not_fit(_seed: int) -> None:
    """They would take nine tenths of the budget, so it is not left; half of it, and it is."""
    cluster = joined()
    enter(cluster)
    assert load(cluster, 24, 3 * CALM_MS), "batches that pass would fill the link again"
    assert not load(cluster, 48, 3 * CALM_MS), "there is room for whole batches"


def what_coalescing_spares_counts(_seed: int) -> None:
    cluster = joined()
    backlog = enter(cluster)

    def spare() -> None:
        backlog.bytes_saved += int(20 * RATE / 1_000)

    assert load(cluster, 48, 3 * CALM_MS, spare), "the same rows sent each time would fill the link"


def whoever_is_fed_in_state_mode_feeds_so(_seed: int) -> None:
    """Of two nodes of a region one is fed by the trainer; it gets no batches that it could send on."""
    cluster = joined(serving=2)
    backlog = enter(cluster)
    leader, other = (backlog.link.node, "eu1" if backlog.link.node == "eu2" else "eu2")
    assert cluster.run_until(lambda: backlog_of(cluster, leader, other) is not None, 200, 5)
    with mock.patch.object(state_mode, "CALM_SHARE", 0.0):  # the trainer's link has less than it needs
        load(cluster, 200, 3 * CALM_MS)
        assert backlog_of(cluster, "t1", leader) is not None, "the scenario proves nothing"
        machine = cluster.nodes[leader].machine
        assert machine is not None
        assert not machine.counters.backlogs_ended, "nobody sends the other one anything"


def who_stood_still_is_no_wave(_seed: int) -> None:
    """Where no rate is set: a child stands still for 1.5 s, again and again. Batches pass again when it has caught up."""
    with little_credit(40_000), short_waves():
        cluster = joined()
        cluster.set_rate("eu", "home", None)
        begun = 0
        for _ in range(3):
            cluster.pause("eu1")
            load(cluster, 20, 1_500)
            cluster.resume("eu1")
            begun += state_of(cluster) is not None
            assert not load(cluster, 40, WAVES_MS // 2), "batches do not pass"
        assert begun == 3, "the scenario proves nothing"


def whole_batches_would_not_fit_the_path(_seed: int) -> None:
    """The same as with a rate, where the path was found to take so much."""
    cluster = joined()
    enter(cluster)
    cluster.set_rate("eu", "home", None)
    with mock.patch.object(Link, "rate", RATE / 1_000):
        assert load(cluster, 24, 3 * CALM_MS), "batches that pass would fill the link again"
        assert not load(cluster, 48, 3 * CALM_MS), "there is room for whole batches"


def of_two_models_neither_keeps_the_other(_seed: int) -> None:
    """A link goes into state mode for both; steps of both come, and are little. Both leave it, and stay out of it."""
    cluster = joined(more=[OTHER])
    write(cluster, 1, model=OTHER)
    cluster.run(1_000)
    backlog = enter(cluster)
    cluster.run(CALM_MS // 2)
    for step in range(20):
        write(cluster, 1, value=step)
        write(cluster, 1, value=step, model=OTHER)
        cluster.run(CALM_MS // 5)
    assert not backlog.link.in_state_mode, "they take turns"
    trainer = cluster.nodes["t1"].machine
    assert trainer is not None
    assert trainer.counters.backlogs_begun == 2


SCENARIOS: list[Scenario] = [
    a_batch_that_takes_too_long_does_not_pass,
    batches_that_together_take_too_long_do_not_pass,
    a_link_that_suffices_passes_batches,
    without_a_rate_a_short_line_waits_a_moment,
    what_matters_goes_ahead,
    who_does_not_tell_its_vector_is_left_to_pull,
    it_is_left_when_it_was_calm,
    it_is_not_left_before_all_is_acknowledged,
    load_in_waves,
    a_wave_long_ago,
    whole_batches_would_not_fit,
    what_coalescing_spares_counts,
    whoever_is_fed_in_state_mode_feeds_so,
    who_stood_still_is_no_wave,
    whole_batches_would_not_fit_the_path,
    of_two_models_neither_keeps_the_other,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(scenario: Scenario) -> None:
    scenario(0)


# --- the rules, switched off ------------------------------------------------------------------------------------------------


def batches_of_any_size_pass(patch: pytest.MonkeyPatch) -> None:
    """How long a batch takes is not asked."""
    patch.setattr(Link, "passes_in_ms", lambda self, payload_bytes: 0.0)


def each_batch_is_looked_at_alone(patch: pytest.MonkeyPatch) -> None:
    """What was sent and waits before a batch does not count."""
    patch.setattr(Link, "passes_in_ms", lambda self, payload_bytes: payload_bytes / self.bucket.rate if self.bucket else 0.0)


def every_batch_enters(patch: pytest.MonkeyPatch) -> None:
    """Batches do not pass that would have passed in time."""
    patch.setattr(push, "PASS_MS_MAX", 20)


def a_line_is_never_overdue(patch: pytest.MonkeyPatch) -> None:
    """What finds no credit waits for as long as it takes."""
    patch.setattr(WaitingLine, "is_overdue", lambda self, now_ms, ms_max: False)


def a_line_is_overdue_at_once(patch: pytest.MonkeyPatch) -> None:
    """A batch that finds no credit does not wait at all."""
    patch.setattr(push, "SHORT_MS_MAX", 0)


def the_way_back_is_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """A link is taken for full before the first acknowledgement could have come."""
    patch.setattr(Link, "returns_ms", 0)


def nothing_leaves_while_the_child_is_asked(patch: pytest.MonkeyPatch) -> None:
    """What matters waits for the child's vector."""
    ready = StateMode._is_ready
    patch.setattr(StateMode, "_is_ready", lambda self, backlog: bool(backlog.request) and ready(self, backlog))


def a_batch_that_does_not_pass_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Rows of the batch that found no room are selected later, as if they were ordinary."""
    patch.setattr(StateMode, "note", lambda self, link, keyspace, batch: None)


def each_session_that_ends_begins_the_wait_anew(patch: pytest.MonkeyPatch) -> None:
    """A child that does not answer is waited for as long as something else happens."""
    again = StateMode._again

    def hopeful(self: StateMode, backlog: Backlog, why: str) -> None:
        again(self, backlog, why)
        backlog.asked_ms = self._core.now_ms

    patch.setattr(StateMode, "_again", hopeful)


def it_is_left_at_once(patch: pytest.MonkeyPatch) -> None:
    """Half a second of calm is not asked for."""
    patch.setattr(state_mode, "CALM_MS", 0)


def it_is_never_left(patch: pytest.MonkeyPatch) -> None:
    """Calm is not noticed."""
    patch.setattr(StateMode, "_look_after", lambda self, backlog: None)


def acknowledgements_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """R16: it is left while something is on its way."""
    look_after = StateMode._look_after

    def hasty(self: StateMode, backlog: Backlog) -> None:
        with mock.patch.object(Link, "sequence_acknowledged", property(lambda link: link.sequence_out)):
            look_after(self, backlog)

    patch.setattr(StateMode, "_look_after", hasty)


def waves_are_not_noticed(patch: pytest.MonkeyPatch) -> None:
    """A link that was in state mode a moment before leaves it as soon as another."""
    patch.setattr(state_mode, "_calm_ms", lambda backlog: state_mode.CALM_MS)


def waves_are_never_over(patch: pytest.MonkeyPatch) -> None:
    """A link that was in state mode once stays longer ever after."""
    enters = StateMode.enter

    def always(self: StateMode, link: Link, keyspace: state_mode.Keyspace, why: str) -> bool:
        place = link.boot, keyspace.replica.keyspace
        if place in self._left:
            self._left[place] = self._core.now_ms
        return enters(self, link, keyspace, why)

    patch.setattr(StateMode, "enter", always)


def it_is_left_however_much_comes(patch: pytest.MonkeyPatch) -> None:
    """Whether whole batches would fit is not asked."""
    patch.setattr(state_mode, "CALM_SHARE", 10.0)


def it_is_left_only_if_next_to_nothing_comes(patch: pytest.MonkeyPatch) -> None:
    """Batches that would fit do not pass."""
    patch.setattr(state_mode, "CALM_SHARE", 0.1)


def only_what_was_sent_counts(patch: pytest.MonkeyPatch) -> None:
    """Rows that coalescing spares are not counted, which batches would send."""
    patch.setattr(StateMode, "_wanted_bytes", lambda self, link: link.bucket.used if link.bucket else 0)


def parents_above_do_not_matter(patch: pytest.MonkeyPatch) -> None:
    """It is left towards a child though no batches come that could be sent on."""
    patch.setattr(Pairs, "overlap", lambda self, other: False)


def whoever_is_back_is_a_wave(patch: pytest.MonkeyPatch) -> None:
    """Also where no rate is set, a link that was in state mode a moment before stays in it for long."""
    enters = StateMode.enter

    def wavy(self: StateMode, link: Link, keyspace: state_mode.Keyspace, why: str) -> bool:
        left = (link.boot, keyspace.replica.keyspace) in self._left
        entered = enters(self, link, keyspace, why)
        if left and entered:
            self.of_link(link)[keyspace.replica.keyspace].waves = True
        return entered

    patch.setattr(StateMode, "enter", wavy)


def what_a_path_takes_is_not_asked(patch: pytest.MonkeyPatch) -> None:
    """Only of a budget it is asked whether whole batches would fit."""
    nearly = StateMode._is_nearly_full
    patch.setattr(StateMode, "_is_nearly_full", lambda self, backlog: backlog.link.bucket is not None and nearly(self, backlog))


def each_keyspace_leaves_alone(patch: pytest.MonkeyPatch) -> None:
    """One that is calm does not wait for the others of its link."""
    pump = StateMode._pump

    def alone(self: StateMode, link: Link) -> None:
        pump(self, link)
        for backlog in list(self.of_link(link).values()):
            if self._look_after(backlog):
                self._end(backlog)

    patch.setattr(StateMode, "_pump", alone)


PLANTS: list[tuple[Plant, Scenario]] = [
    (batches_of_any_size_pass, a_batch_that_takes_too_long_does_not_pass),
    (each_batch_is_looked_at_alone, batches_that_together_take_too_long_do_not_pass),
    (every_batch_enters, a_link_that_suffices_passes_batches),
    (a_line_is_never_overdue, without_a_rate_a_short_line_waits_a_moment),
    (a_line_is_overdue_at_once, without_a_rate_a_short_line_waits_a_moment),
    (the_way_back_is_not_waited_for, without_a_rate_a_short_line_waits_a_moment),
    (nothing_leaves_while_the_child_is_asked, what_matters_goes_ahead),
    (a_batch_that_does_not_pass_is_forgotten, what_matters_goes_ahead),
    (each_session_that_ends_begins_the_wait_anew, who_does_not_tell_its_vector_is_left_to_pull),
    (it_is_left_at_once, it_is_left_when_it_was_calm),
    (it_is_never_left, it_is_left_when_it_was_calm),
    (acknowledgements_are_not_waited_for, it_is_not_left_before_all_is_acknowledged),
    (waves_are_not_noticed, load_in_waves),
    (waves_are_never_over, a_wave_long_ago),
    (it_is_left_however_much_comes, whole_batches_would_not_fit),
    (it_is_left_only_if_next_to_nothing_comes, whole_batches_would_not_fit),
    (only_what_was_sent_counts, what_coalescing_spares_counts),
    (parents_above_do_not_matter, whoever_is_fed_in_state_mode_feeds_so),
    (whoever_is_back_is_a_wave, who_stood_still_is_no_wave),
    (what_a_path_takes_is_not_asked, whole_batches_would_not_fit_the_path),
    (each_keyspace_leaves_alone, of_two_models_neither_keeps_the_other),
]


@pytest.mark.parametrize(("plant", "scenario"), PLANTS, ids=lambda item: item.__name__)
def test_a_planted_bug_is_caught(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, 1)
