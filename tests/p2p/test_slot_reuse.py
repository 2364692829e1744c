"""R18: an answer of which a row was removed, and its slot given away, since it was selected."""

import numpy as np
import pytest

from ekko.model import table_id
from p2p.pulling import outbox
from tests.p2p.chaos import at_rest, form


def an_answer_loses_rows_on_its_way(patch: pytest.MonkeyPatch) -> int:
    """While an answer is sent, its sender removes a row of it, and another key gets the slot; returns pulls given up."""
    cluster = form(3)
    cluster.run(5_000)
    cluster.publish("t1", "item", range(20), 1.0)
    at_rest(cluster)
    cluster.crash("eu1")
    cluster.restart("eu1", keep_state=False)
    original = outbox.next_chunk
    removed: list[int] = []

    def chunk(stream: outbox.PullStream, keyspace: object) -> object:
        places = [place for selection in stream.selections for place in selection.slots.tolist()]
        if places and not removed:
            store = next(node.store for node in cluster.nodes.values() if keyspace.replica is node.store.models["ctr"])  # type: ignore[attr-defined]
            store.models["ctr"].remove(table_id("item"), np.array(places[:1], np.int64), complete=False)
            removed.append(places[0])
        return original(stream, keyspace)  # type: ignore[arg-type]

    patch.setattr(outbox, "next_chunk", chunk)
    node = cluster.nodes["eu1"]
    assert cluster.run_until(lambda: node.machine is not None and bool(removed), 20_000, 1)
    cluster.run(100)
    assert node.machine is not None
    return node.machine.counters.pulls_abandoned


def test_an_answer_that_lost_a_row_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert an_answer_loses_rows_on_its_way(monkeypatch) == 1
