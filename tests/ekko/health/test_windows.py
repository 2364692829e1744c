"""Events become windows when they are complete, windows of all nodes meet, and are judged in their order, once."""

import random
import struct
import time
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekko.errors import ConfigError, ModelError
from ekko.facts import changed_entries
from ekko.generations import Generation
from ekko.health import summaries as module
from ekko.health.detectors import Finding, Window
from ekko.health.judge import SETTLE_MS, WAIT_MS_MAX, Judge, checked
from ekko.health.samples import Sample, find_metric, sample_of
from ekko.health.summaries import TOLD_TIMES, WINDOWS_MAX, Summaries, Told
from ekko.health.traffic import BASELINE, ONLINE
from ekko.health.verdicts import Verdicts
from ekko.health.windows import AHEAD_MS_MAX, OTHER, PATIENCE_MS, SEGMENTS_MAX, WINDOWS_OPEN_MAX, Events, Windows
from ekko.model import ModelSpec, TableSpec
from ekko.store import Store
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry

T = 1_700_000_000_000
CTR = Generation("ctr")


def events(*at_ms: int, arm: int = ONLINE, segment: str = "") -> Events:
    count = len(at_ms)
    label = np.arange(count) % 2
    ones = np.ones(count, np.float32)
    return Events(np.array(at_ms), ones / 2, label.astype(np.float32), ones, np.full(count, arm, np.uint8), segment)


# --- windows


def test_a_window_closes_when_the_newest_event_says_so_and_late_ones_are_counted() -> None:
    windows = Windows(1_000, 500)
    windows.add(events(T, T + 100, T + 999), T + 1_000)
    windows.add(events(T + 300, arm=BASELINE), T + 1_000)
    assert windows.close(T + 1_400) == []
    windows.add(events(T + 1_600), T + 1_600)
    (closed,) = windows.close(T + 1_600)
    assert closed.window == T // 1_000
    assert [arm.events for arm in closed.arms] == [3, 1]
    windows.add(events(T + 999, T + 1_000), T + 1_700)
    assert (windows.taken, windows.late, windows.ahead) == (6, 1, 0)
    windows.add(events(T + 1_700 + AHEAD_MS_MAX + 1), T + 1_700)
    assert windows.ahead == 1
    assert windows.watermark_ms(T + 1_700) == T + 1_100, "what is of the future does not push the watermark"


def test_a_clock_that_is_ahead_closes_nobody_elses_window() -> None:
    windows = Windows(1_000, 500)
    windows.add(events(T + AHEAD_MS_MAX), T)
    assert windows.close(T) == []
    windows.add(events(T + 100), T + 200)
    assert (windows.taken, windows.late) == (2, 0)


def test_a_report_of_a_whole_hour_is_the_same_as_many_small_ones_and_quick() -> None:
    rng = np.random.default_rng(0)
    count = 30_000
    columns = [rng.random(count).astype(np.float32) for _ in range(2)]
    weight, arm = rng.choice(np.array([1, 5], np.float32), count), rng.integers(0, 2, count).astype(np.uint8)
    whole = Events(rng.integers(T - 3_600_000, T, count), *columns, weight, arm, "eu")
    one, other = (Windows(10_000, 3_600_000, lambda p, y, w: p) for _ in range(2))
    begin = time.process_time()
    one.add(whole, T)
    assert time.process_time() - begin < 0.5, "the node's loop waits for it"
    for part in np.array_split(np.arange(count), 7):
        other.add(whole.chosen(np.isin(np.arange(count), part)), T)
    assert one.samples == other.samples == 2 * 2 * 360
    for left, right in zip(one.close(T + 10**7), other.close(T + 10**7), strict=True):
        assert left.window == right.window
        for sample, same in zip((*left.arms, *left.segments["eu"]), (*right.arms, *right.segments["eu"]), strict=True):
            assert (sample.events, sample.heaviest) == (same.events, same.heaviest)
            for name in ("auc", "log_loss", "ctr", "own"):
                (a, _), (b, _) = sample.quality(name), same.quality(name)
                assert (a.count, a.total, a.spread) == pytest.approx((b.count, b.total, b.spread), rel=1e-9)
    assert (one.samples, one.open) == (0, 0)


def test_a_stall_of_the_labels_is_waited_for_and_quiet_is_not() -> None:
    windows = Windows(1_000, 500)
    windows.add(events(T), T)
    assert windows.close(T + 30_000) == [], "they may come yet"
    windows.add(events(T + 900), T + 30_000)
    (closed,) = windows.close(T + PATIENCE_MS + 2_000)
    assert closed.arms[0].events == 2
    assert windows.open == 0
    windows.add(events(T + 500), T + PATIENCE_MS + 2_000)
    assert windows.late == 1


def test_open_windows_and_segments_have_bounds() -> None:
    windows = Windows(1_000, 3_600_000)
    for second in range(WINDOWS_OPEN_MAX + 50):
        windows.add(events(T + 1_000 * second), T + 1_000 * second)
        windows.close(T + 1_000 * second)
    assert windows.open <= WINDOWS_OPEN_MAX
    many = Windows(1_000, 0)
    for number in range(SEGMENTS_MAX + 5):
        many.add(events(T, segment=f"s{number}"), T)
    many.add(events(T + 1_000), T + 1_000)
    (closed,) = many.close(T + 1_000)
    assert len(closed.segments) == SEGMENTS_MAX + 1
    assert closed.segments[OTHER][0].events == 5
    assert closed.arms[0].events == SEGMENTS_MAX + 5
    many.add(events(T + 1_500, segment="real"), T + 1_500)
    (closed,) = many.close(T + 10_000_000)
    assert set(closed.segments) == {"real"}, "names that nobody uses any more make room"
    tight = Windows(1_000, 3_600_000)
    tight.add(events(T, T + 1_000, segment="eu"), T + 1_000, room=3)
    assert tight.samples == 3, "what is judged goes before what segments are like"
    with pytest.raises(ModelError, match="no room for 2 open windows more"):
        tight.add(events(T + 1_000, T + 2_000, T + 3_000), T + 3_000, room=1)
    assert (tight.taken, tight.samples, tight.open) == (2, 3, 2)


def test_a_metric_of_the_users_own_is_counted_or_refused_whole() -> None:
    windows = Windows(1_000, 0, lambda p, y, w: (p >= 0.5) * y)
    windows.add(events(T, T + 1, T + 1_000), T + 1_000)
    assert windows.close(T + 1_000)[0].arms[0].own.mean == 0.5

    def meddling(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        w[:] = 1_000
        return p

    nothings = [lambda p, y, w: p * np.nan, lambda p, y, w: None, lambda p, y, w: "high", meddling]
    for broken in (lambda p, y, w: p * 3, lambda p, y, w: p[:-1], lambda p, y, w: 1 / 0, *nothings):
        failing = Windows(1_000, 0, broken)
        with pytest.raises(ModelError, match="own_metric"):
            failing.add(events(T, T + 1), T)
        assert (failing.taken, failing.open, failing.refused) == (0, 0, 2)
    with pytest.raises(ConfigError, match="no installed package offers metric 'watch_time'"):
        find_metric("watch_time")


# --- summaries


def summary(node: str, window: int, count: float = 10.0, model: Generation = CTR, total: float = 0.0) -> Summaries:
    sample = sample_of(np.full(int(count), 0.25, np.float32), (np.arange(int(count)) % 2).astype(np.float32))
    return Summaries.said(model, node, 1_000, window, Told(total or count, (sample, Sample())))


told = st.builds(
    summary,
    st.sampled_from(["a", "b"]),
    st.integers(0, 2 * WINDOWS_MAX),
    st.sampled_from([5.0, 10.0]),
    st.sampled_from([CTR, Generation("cvr", 1)]),
)


@given(st.lists(told, max_size=60), st.randoms())
def test_merging_summaries_is_a_join(said: list[Summaries], rng: random.Random) -> None:
    whole = Summaries()
    for one in said:
        whole = whole.merged(one)
    shuffled = said + said
    rng.shuffle(shuffled)
    other = Summaries()
    for one in shuffled:
        other = other.learned(one.entries())
    assert other == whole
    assert whole.merged(other) is whole
    half = Summaries()
    for one in said[::2]:
        half = half.merged(one)
    told_of_it = changed_entries(half, whole)
    assert list(told_of_it) == [entry for entry in whole.entries() if entry not in half.entries()]
    assert len(whole) <= 4 * WINDOWS_MAX


def test_nodes_windows_add_up_and_pass_through_stores_without_becoming_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Store.anonymous(), Store.anonymous()
    for store in (one, other):
        store.add_model(ModelSpec("ctr", 4, {"item": TableSpec("item", 2)}))
    before = other.schema()
    for window in range(5):
        one.facts.note(summary("a", window))
        other.facts.note(summary("b", window, 30.0))
    entries = one.facts.of(Summaries).told(CTR, "a", 1_000, 4)
    assert len(entries) == TOLD_TIMES
    assert other.adopt(entries)
    assert not other.adopt(entries), "no news, so it is not passed on again"
    assert other.schema() == before
    known = other.facts.of(Summaries).of(CTR, 1_000)
    assert {node: Told.parse(windows[4]).events for node, windows in known.items()} == {"a": 10, "b": 30}
    assert [*known["b"]] == [0, 1, 2, 3, 4]
    assert other.adopt(one.facts.of(Summaries).told_again("a")), "to one that was away all of it is told"
    assert [*other.facts.of(Summaries).of(CTR, 1_000)["a"]] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(module, "TOLD_AGAIN_MAX", 2)
    newest = [entry.name for entry in one.facts.of(Summaries).told_again("a")]
    assert newest == ["quality:a:1000:4", "quality:a:1000:3"]
    assert other.facts.of(Summaries).without(lambda _: True) == Summaries()


(ENTRY,) = summary("a", 7).entries()
WORDS = msgpack.unpackb(ENTRY.body)


def sums_of(value: float) -> bytes:
    """The entry's window, its click count replaced."""
    packed: bytes = WORDS[5]
    at = 12 + 4 * 2  # behind the head, and two sums
    return packed[:at] + np.float32(value).tobytes() + packed[at + 4 :]


@pytest.mark.parametrize(
    "entry",
    [
        replace(ENTRY, body=b"\xc1"),
        replace(ENTRY, body=msgpack.packb([*WORDS[:5], WORDS[5][:-4]])),
        replace(ENTRY, body=msgpack.packb([*WORDS[:5], WORDS[5] + b"x"])),
        replace(ENTRY, body=msgpack.packb([*WORDS[:5], WORDS[5][:8] + b"\xff\xff\xff\xff" + WORDS[5][12:]])),
        *(replace(ENTRY, body=msgpack.packb([*WORDS[:5], sums_of(value)])) for value in (np.nan, np.inf, -1.0, 1e13)),
        *(
            replace(ENTRY, body=msgpack.packb([*WORDS[:5], total + WORDS[5][8:]]))
            for total in (b"\xff" * 8, struct.pack("<d", -1.0))
        ),
        replace(ENTRY, body=msgpack.packb([*WORDS[:3], 0, *WORDS[4:]])),
        replace(ENTRY, body=msgpack.packb([*WORDS[:3], 1 << 40, *WORDS[4:]])),
        replace(ENTRY, body=msgpack.packb([*WORDS[:4], -1, WORDS[5]])),
        replace(ENTRY, body=msgpack.packb([*WORDS[:2], "-a", *WORDS[3:]])),
        replace(ENTRY, name="quality:b:1000:7"),
        replace(ENTRY, keyspace=1),
    ],
)
def test_junk_is_the_peers_fault_and_changes_nothing(entry: SchemaEntry) -> None:
    store = Store.anonymous()
    with pytest.raises(RemoteProtocolError):
        store.adopt([ENTRY, entry])
    assert store.facts.of(Summaries) == Summaries()
    assert store.adopt([ENTRY])


def test_what_is_remembered_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUMMARIES_MAX", 20)
    known = Summaries()
    for window in range(100):
        for node in ("a", "b", "c"):
            known = known.merged(summary(node, window))
    assert len(known) == 20
    assert known.merged(summary("a", 0)) is known, "what is forgotten is no news"


# --- the judge


class Scripted:
    """Says of a window what it is told to."""

    name = "scripted"

    def __init__(self, script: dict[int, str]) -> None:
        self.script = script
        self.seen: list[tuple[int, float]] = []

    def observe(self, window: Window) -> list[Finding]:
        self.seen.append((window.number, window.arms[0].events))
        state = self.script.get(window.number)
        if state == "fail":
            raise ZeroDivisionError("oops")
        return [] if state is None else [Finding(state, window.from_ms, window.until_ms, f"is {state}")]  # type: ignore[arg-type]


def judge_of(*detectors: Scripted) -> Judge:
    return Judge(CTR, "me", 1_000, 500, 0, detectors)


def look(judge: Judge, known: Summaries, verdicts: Verdicts, now_ms: int) -> Verdicts:
    return judge.judge(known, verdicts, now_ms)


def test_a_window_is_judged_once_when_all_who_report_have_told() -> None:
    detector = Scripted({})
    judge, known, first = judge_of(detector), Summaries(), T // 1_000
    known = known.merged(summary("a", first)).merged(summary("b", first, 20.0)).merged(summary("a", first + 1))
    due_ms = T + 1_000 + 500 + SETTLE_MS
    look(judge, known, Verdicts(), due_ms - 1)
    assert detector.seen == []
    look(judge, known, Verdicts(), due_ms + 1_000)
    assert detector.seen == [(first, 30.0)], "node b has not told of the second yet"
    look(judge, known.merged(summary("b", first + 1)), Verdicts(), due_ms + 1_000)
    assert detector.seen == [(first, 30.0), (first + 1, 20.0)]
    look(judge, known.merged(summary("c", first)), Verdicts(), due_ms + 2_000)
    assert detector.seen == [(first, 30.0), (first + 1, 20.0)], "what is late is only for those who ask for it"
    assert len(judge.history) == 2


def test_a_node_that_stopped_is_waited_for_only_so_long() -> None:
    detector = Scripted({})
    judge, first = judge_of(detector), T // 1_000
    known = summary("gone", first)
    for number in range(first, first + 10):
        known = known.merged(summary("a", number))
    look(judge, known, Verdicts(), T + 2_000 + 500 + SETTLE_MS)
    assert [number for number, _ in detector.seen] == [first]
    # It is waited for until others are three windows ahead, however short they are; alone with it, for a minute.
    look(judge, known, Verdicts(), T + 3_000 + 500 + SETTLE_MS)
    assert [number for number, _ in detector.seen] == [first]
    look(judge, known, Verdicts(), T + 5_000 + 500 + SETTLE_MS)
    assert [number for number, _ in detector.seen] == [*range(first, first + 5)]
    slow, two = judge_of(Scripted({})), summary("gone", first).merged(summary("a", first + 1))
    look(slow, two, Verdicts(), T + 2_000 + 500 + SETTLE_MS + WAIT_MS_MAX - 1)
    assert slow._next == first + 1
    look(slow, two, Verdicts(), T + 2_000 + 500 + SETTLE_MS + WAIT_MS_MAX)
    assert slow._next == first + 2
    quick = judge_of(Scripted({}))
    look(quick, known.merged(summary("a", first + 500)), Verdicts(), T + 12_000)
    assert all(number < first + 500 for number, _ in quick.detectors[0].seen), "windows of the future are not looked at"  # type: ignore[attr-defined]


def test_what_a_node_tells_after_a_cut_is_judged_late_or_counted_as_missed() -> None:
    patient, strict = Scripted({}), Scripted({})
    patient.takes_late, strict.name = True, "strict"  # type: ignore[attr-defined]
    judge, known, first = judge_of(patient, strict), Summaries(), T // 1_000
    for number in range(first, first + 4):
        known = known.merged(summary("a", number, 10.0, total=10.0 * (number - first + 1)))
    look(judge, known, Verdicts(), T + 70_000)
    assert (len(patient.seen), judge.missed) == (4, 0)
    # Node b was cut off in the second and third: first its newest comes, and what it had said before shows.
    known = known.merged(summary("b", first, 20.0, total=20.0))
    look(judge, known, Verdicts(), T + 70_000)
    known = known.merged(summary("b", first + 4, 20.0, total=100.0))
    look(judge, known, Verdicts(), T + 70_000)
    assert judge.missed == 60
    known = known.merged(summary("b", first + 1, 20.0, total=40.0)).merged(summary("b", first + 2, 20.0, total=60.0))
    look(judge, known, Verdicts(), T + 71_000)
    look(judge, known, Verdicts(), T + 72_000)
    assert judge.missed == 20, "one window never came"
    assert patient.seen[4:] == [(first, 20.0), (first + 4, 20.0), (first + 1, 20.0), (first + 2, 20.0)], "each once"
    assert [number for number, _ in strict.seen] == [first, first + 1, first + 2, first + 3, first + 4]
    assert len(judge.history) == 5
    # Restarted: it counts from 0, and what was missed stays missed.
    look(judge, known.merged(summary("b", first + 5, 20.0, total=20.0)), Verdicts(), T + 73_000)
    assert judge.missed == 20
    late = known.merged(summary("b", first - 2 * WINDOWS_MAX, 20.0, total=1.0))
    look(judge, late, Verdicts(), T + 74_000)
    assert len(patient.seen) == 9, "what is older than what is remembered is not judged twice"


def test_a_detector_that_says_nonsense_loses_its_say_and_nobody_elses() -> None:
    first = T // 1_000
    window = Window(first, T, T + 1_000, (Sample(), Sample()))
    good = Finding("uncertain", T, T + 1_000, "fine")
    assert checked(good, window) is good
    nonsense: list[object] = [None, "corrupted", replace(good, state="bad"), replace(good, from_ms=float("nan"))]  # type: ignore[arg-type]
    nonsense += [replace(good, from_ms=T + 2_000), replace(good, until_ms=T + 10_000_000), replace(good, text=None)]  # type: ignore[arg-type]
    for said in nonsense:
        with pytest.raises(ModelError, match="it said"):
            checked(said, window)
    wild, calm = Scripted({first: "doomed"}), Scripted({first: "uncertain"})
    wild.name = "wild"
    judge = judge_of(wild, calm)
    verdicts = look(judge, summary("a", first), Verdicts(), T + 60_000)
    assert "it said" in judge.why()["wild"]
    assert [one.state for one in verdicts.intervals("ctr")] == ["uncertain"]


def test_the_worst_counts_and_only_changes_are_logged() -> None:
    first = T // 1_000
    calm = Scripted({first: "healthy", first + 1: "healthy", first + 2: "uncertain", first + 3: "fail"})
    alarmed = Scripted({first + 2: "corrupted"})
    alarmed.name = "alarmed"
    judge, known, verdicts = judge_of(calm, alarmed), Summaries(), Verdicts()
    for number in range(first, first + 5):
        known = known.merged(summary("a", number))
        verdicts = look(judge, known, verdicts, (number + 4) * 1_000)
    assert [(one.detector, one.state) for one in verdicts.log("ctr")] == [("scripted", "healthy"), ("alarmed", "corrupted")]
    assert verdicts.healthy_until("ctr") == T + 2_000
    assert verdicts.state("ctr", T + 10_000) == "corrupted"
    assert "ZeroDivisionError" in judge.why()["scripted"], "it has no say any more, and the others go on"
    assert len(alarmed.seen) == 5
