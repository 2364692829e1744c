"""The scorer's half: what users pass is checked, what waits goes together, and nothing of it takes long or much memory."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ekko.errors import ModelError
from ekko.health import reporting
from ekko.health.reporting import PARTS_QUEUED_MAX, Reporter
from ekko.health.windows import OTHER, SEGMENTS_MAX, Events
from ekko.health.wire import REPORT_EVENTS_MAX, SEGMENT_BYTES_MAX, Report, Reported, events_of

T = 1_700_000_000_000


class Node:
    """Takes the place of the node, which answers only once it is let."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.is_asked = threading.Event()
        self.answers = threading.Event()

    def ask(self, report: Report, _timeout_s: float) -> Reported:
        self.is_asked.set()
        assert self.answers.wait(60)
        self.asked.append((report.model, report.events.segment, len(report.events)))
        return Reported(len(report.events), 0, 0)

    def close(self) -> None:
        """As the connection."""


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node()
    monkeypatch.setattr(reporting, "Connections", lambda _: node)
    monkeypatch.setattr(reporting, "read_endpoint", lambda _: "")
    return node


def one(segment: str = "", count: int = 1) -> Events:
    (events,) = events_of(np.full(count, 0.5), np.zeros(count), None, segment, 0, T)
    return events


def test_what_waits_goes_as_one_report_of_a_model_and_segment(node: Node) -> None:
    reporter = Reporter(Path("nowhere"))
    assert reporter.put("cvr", one())
    assert node.is_asked.wait(60)
    for number in range(1, 3_000):
        assert reporter.put("ctr" if number % 3 else "cvr", one("eu" if number % 2 else ""))
    node.answers.set()
    assert reporter.flush(60)
    reporter.close()
    assert sum(count for *_, count in node.asked) == reporter.counts.sent == 3_000
    rest = [("cvr", "", 499), ("cvr", "eu", 500), ("ctr", "", 1_000), ("ctr", "eu", 1_000)]
    assert node.asked[0] == ("cvr", "", 1)
    assert sorted(node.asked[1:]) == sorted(rest), "the first by itself, and then one for each kind"


def test_reports_and_queue_have_bounds(node: Node) -> None:
    reporter = Reporter(Path("nowhere"))
    event = one()
    assert reporter.put("ctr", event)
    assert node.is_asked.wait(60)
    taken = 1 + sum(reporter.put("ctr", event) for _ in range(PARTS_QUEUED_MAX + 100))
    assert taken == 1 + PARTS_QUEUED_MAX, "what is on its way, and what waits"
    assert reporter.counts.dropped == 100
    large = sum(reporter.put("ctr", one("", REPORT_EVENTS_MAX)) for _ in range(10))
    assert large == 0
    node.answers.set()
    assert reporter.flush(60)
    assert all(count <= REPORT_EVENTS_MAX for *_, count in node.asked)
    reporter.close()
    assert reporter.counts.sent == taken


def test_a_name_for_each_event_costs_neither_time_nor_messages() -> None:
    count = 60_000
    begin = time.process_time()
    parts = list(events_of(np.full(count, 0.5), np.zeros(count), None, [f"user {n // 2}" for n in range(count)], 0, T))
    assert time.process_time() - begin < 2
    assert len(parts) == SEGMENTS_MAX + 1
    assert sum(map(len, parts)) == count
    assert max(len(part) for part in parts if part.segment != OTHER) == 2
    long = [f"{'x' * SEGMENT_BYTES_MAX}{n}" for n in range(5)]
    (same,) = events_of(np.full(5, 0.5), [0, 1, 0, 1, 0], None, long, 0, T)
    assert same.label.tolist() == [0, 1, 0, 1, 0]
    names = [*["eu"] * 3, "us", *["eu"] * 2]
    eu, us = events_of(np.arange(6) / 10, np.zeros(6), None, names, 0, T)
    assert (eu.segment, us.segment) == ("eu", "us")
    assert eu.prediction.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.5])


@pytest.mark.parametrize(
    "junk",
    [
        {"prediction": ["x"]},
        {"prediction": [[0.1], [0.2, 0.3]]},
        {"prediction": [0.1 + 2j]},
        {"prediction": [float("nan")]},
        {"label": [None]},
        {"label": [-0.1]},
        {"weight": float("nan")},
        {"weight": -1},
        {"weight": 1e9},
        {"weight": 0},
        {"arm": np.array([256])},
        {"arm": -1},
        {"arm": 0.5},
        {"at_ms": float("nan")},
        {"at_ms": -1},
        {"at_ms": "noon"},
        {"segment": ["a", "b"]},
    ],
)
def test_junk_is_refused_with_an_error_that_names_it(junk: dict[str, Any]) -> None:
    good: dict[str, Any] = {"prediction": [0.5], "label": [1], "weight": None, "segment": None, "arm": 0, "at_ms": T}
    assert len(list(events_of(**good))) == 1
    with pytest.raises(ModelError, match=r"expected|does not fit|see Reader\.arm|outside"):
        list(events_of(**good | junk))


def test_a_name_that_is_no_text_elsewhere_is_one_here() -> None:
    (part,) = events_of([0.5], [1], None, "\ud800", 0, T)
    assert part.segment == "?"
