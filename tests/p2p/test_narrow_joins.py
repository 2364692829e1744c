"""A join of several models over a path that is narrow: an answer that waits for another one of its peer is not given up."""

import pytest

from ekko.model import ModelSpec, TableSpec
from p2p import messages as m
from p2p.link import links
from p2p.pulling import outbox, pull
from sim_cluster.network import LinkOptions, NetworkOptions
from sim_cluster.virtual import VirtualCluster

ROWS, DIM, CHUNK = 4_000, 16, 32 << 10
STATE = ROWS * (16 + 4 * DIM)  # bytes of a model
RATE = 50  # bytes a millisecond from eu to us
MODELS = [ModelSpec(name, 8, {"item": TableSpec("item", DIM)}) for name in ("ads", "ctr", "feed")]


def join() -> tuple[int, int]:
    """Three models come from one peer. Returns how many milliseconds it took, and pulls that were given up."""
    cluster = VirtualCluster(1, NetworkOptions(1, 2), MODELS[0], MODELS[1:])
    cluster.add("eu1", "eu", "train")
    cluster.run(3_000)
    for model in MODELS:
        assert cluster.publish("eu1", "item", range(ROWS), 1.0, model=model.name)
    cluster.run(1_000)
    cluster.options = NetworkOptions(1, 2, links={"eu/us": LinkOptions(delay_ms=20, shared_bytes_per_ms=RATE)})
    cluster.add("us1", "us", "serve", ["eu1"])
    begin_ms, source, joiner = cluster.now_ms, cluster.nodes["eu1"], cluster.nodes["us1"]

    def done() -> bool:
        reached = [int(joiner.store.models[model.name].frontier.max()) for model in MODELS]
        return reached == [int(source.store.models[model.name].frontier.max()) for model in MODELS]

    assert cluster.run_until(done, 120_000, 100)
    assert joiner.machine is not None
    return cluster.now_ms - begin_ms, joiner.machine.counters.pulls_abandoned


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "CHUNK_BYTES_MAX", CHUNK)
    monkeypatch.setattr(links, "CREDIT_BYTES_MAX", 4 * CHUNK)
    monkeypatch.setattr(links, "ACK_BYTES", CHUNK // 4)


def test_models_that_come_one_after_the_other_take_what_their_bytes_take() -> None:
    assert STATE / RATE > pull.PULL_SILENCE_MS
    took_ms, abandoned = join()
    assert abandoned == 0
    assert took_ms < 1.2 * len(MODELS) * STATE / RATE + 2_000


def test_were_each_answer_timed_alone_those_behind_the_first_would_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(self: pull.Pull, link: links.Link, now: m.Now) -> None:
        for asked in self._asked.values():
            if asked.boot == link.boot and asked.next_chunk:
                asked.deadline_ms = now.monotonic_ms + pull.PULL_SILENCE_MS

    monkeypatch.setattr(pull.Pull, "_put_off_silence", alone)
    assert join()[1] > 0
