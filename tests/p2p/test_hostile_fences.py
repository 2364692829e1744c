"""What a peer may tell of fences and retirements: bounded, passed on in messages that others take, and no end of all fences."""

from unittest import mock

import pytest
import xxhash

from p2p import messages as m
from p2p import wire
from p2p.identity import ledger, retirement
from p2p.identity.ledger import FENCES_MAX
from p2p.identity.retirement import EXPELLED_MAX, TOLD_ENTRIES_MAX
from p2p.messages.fences import CLOSED, EPOCH_BITS, LIFTED, RESTORERS_MAX, Restorer
from sim_cluster.virtual import VirtualCluster
from tests.p2p.backlog_chaos import pair
from tests.p2p.fence_chaos import answer, ask, fence
from tests.p2p.retirement_chaos import two_trainers
from tests.p2p.test_hostile import machine_of
from tests.p2p.writer_chaos import writes


def tell(cluster: VirtualCluster, at: str, source: str, told: m.Message) -> None:
    """A message of a peer, as it comes over their link."""
    machine = machine_of(cluster, at)
    envelope = m.Envelope(machine._core.links[source].boot, machine._core.options.boot, version=2)
    cluster.feed(cluster.nodes[at], machine, m.MessageReceived(envelope, told))


def strange_fences(count: int, before: tuple[int, int] | None = None) -> tuple[m.Fence, ...]:
    """Of families that nobody has; those that everybody would rather keep than this one, if anything went by their names."""
    found: list[m.Fence] = []
    family = 1 << 20
    while len(found) < count:
        one = m.Fence(family, 1)
        if before is None or _order(one.key) < _order(before):
            found.append(one)
        family += 1
    return tuple(found)


def _order(key: tuple[int, int]) -> int:
    return xxhash.xxh3_64_intdigest(f"kept {key}".encode())


def test_all_that_may_be_kept_is_told_in_messages_that_others_take() -> None:
    restorers = tuple(Restorer(writer, 2**64 - 1, 2**63 + writer) for writer in range(RESTORERS_MAX))
    fences = tuple(m.Fence(family, 2**62, CLOSED, 2**63, 0, restorers, "n" * 200) for family in range(FENCES_MAX))
    lives = tuple(m.Expulsion(f"node-{boot}", 2**63 + boot, 1_700_000_000_000) for boot in range(EXPELLED_MAX))
    retired = tuple(m.Retired(writer, writer, writer & 4095, 2**63, m.FROZEN) for writer in range(TOLD_ENTRIES_MAX))
    heard: list[m.Retirements] = []
    for part in retirement._parts(m.Retirements(lives, retired, fences)):
        frames = wire.encode(m.Envelope(1, 2, version=2), part)
        message = wire.decode([memoryview(bytes(frame)) for frame in frames])[1]
        assert isinstance(message, m.Retirements)
        heard.append(message)
    assert tuple(one for part in heard for one in part.expulsions) == lives
    assert tuple(one for part in heard for one in part.fences) == fences
    assert [one.key for part in heard for one in part.retired] == [one.key for one in retired]


def test_fences_of_families_that_nobody_has_push_none_out_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FENCES_MAX", 16)
    cluster = two_trainers(1)
    epoch = fence(cluster, "eu1").epoch
    ours = cluster.model.id, epoch
    for wave in range(3):
        told = strange_fences(16 * (wave + 2), ours)[16 * wave :]
        tell(cluster, "us1", "t1", m.Retirements((), (), told))
    cluster.run(3_000)
    for name in cluster.nodes:
        core = machine_of(cluster, name)._core
        assert ours in core.record.fences, f"{name} has forgotten the fence of its own model"
        assert core.record.fences[ours].stage == CLOSED
        assert len(core.fences) <= 16, "what is not kept any more counts for nothing"
    number = cluster.ask("t2", lambda request: m.LiftRequested(request, *ours))
    assert cluster.run_until(lambda: isinstance(answer(cluster, "t2", number), m.Lifted), 10_000)


def test_after_the_last_epoch_that_can_be_told_a_fence_is_refused_with_the_remedy() -> None:
    cluster, last = two_trainers(2), (1 << EPOCH_BITS) - 1
    tell(cluster, "eu1", "t1", m.Retirements((), (), (m.Fence(cluster.model.id, last),)))
    cluster.run(3_000)
    number = cluster.ask("us1", lambda request: m.LiftRequested(request, cluster.model.id, last))
    assert cluster.run_until(lambda: isinstance(answer(cluster, "us1", number), m.Lifted), 10_000)
    assert cluster.run_until(lambda: len(digests(cluster)) == 1, 10_000)
    before = digests(cluster)
    reply = answer(cluster, "us1", ask(cluster, "us1"))
    assert isinstance(reply, m.Refused)
    assert "new generation" in reply.reason
    cluster.run(1_000)
    assert digests(cluster) == before
    writes(cluster, "t1")


def digests(cluster: VirtualCluster) -> set[int]:
    """What nodes know of all that is over; one, when they agree."""
    return {machine_of(cluster, name)._core.retired_digest for name in cluster.nodes}


def test_a_note_that_cannot_be_written_down_is_written_down_as_far_as_it_can() -> None:
    cluster = two_trainers(4)
    number = cluster.ask("eu1", lambda request: m.FenceRequested(request, cluster.model.id, 0, "bad \ud800 labels"))
    assert cluster.run_until(lambda: isinstance(answer(cluster, "eu1", number), m.Fenced), 30_000)
    assert {machine_of(cluster, name)._core.fences[cluster.model.id].note for name in cluster.nodes} == {"bad ? labels"}


def test_reports_of_a_fence_that_is_over_are_forgotten() -> None:
    cluster = two_trainers(3)
    first, family = min(cluster.nodes), cluster.model.id
    fencing = machine_of(cluster, first)._fencing
    for epoch in (5, 6, 7):
        tell(cluster, first, "t1", m.Retirements((), (), (m.Fence(family, epoch),)))
        for source in ("t1", "t2", "us1"):
            tell(cluster, first, source, m.FenceReport(family, epoch, 1, False, tuple(range(1, 4_000))))
    assert set(fencing._reports) == {(family, 7)}
    until = machine_of(cluster, first)._core.clock.last | 4095
    tell(cluster, first, "t1", m.Retirements((), (), (m.Fence(family, 7, LIFTED, 0, until),)))
    assert not fencing._reports


def test_many_fences_that_are_ready_at_once_are_closed_together() -> None:
    cluster = pair(1)
    machine = machine_of(cluster, "t1")
    fences = tuple(m.Fence(family, 1) for family in range(1 << 20, (1 << 20) + 400))
    tell(cluster, "t1", "eu1", m.Retirements((), (), fences))
    record = machine._core.record
    with mock.patch.object(type(record), "save", autospec=True, side_effect=type(record).save) as save:
        cluster.leave("eu1")
        cluster.run(2_000)
    assert {fence.stage for fence in machine._core.fences.values()} == {CLOSED}
    assert save.call_count < 10, "the disk is waited for once, not for each"
