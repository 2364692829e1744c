"""Writer ids in blocks: scenarios, the rules behind them switched off one at a time, and the book itself."""

import random

import msgpack
import pytest

from p2p.errors import LocalProtocolError
from p2p.identity.allotment import Allotment
from p2p.identity.ledger import NodeRecord
from p2p.identity.writers import BLOCK_IDS, BLOCKS, WriterBook, WriterConflictError
from p2p.messages import BlockGrant, Leaving
from sim_cluster.node import MemoryLedger
from tests.p2p.chaos import at_rest, form
from tests.p2p.plants import Plant, Scenario, expect_caught
from tests.p2p.test_hostile import machine_of
from tests.p2p.writer_chaos import (
    SCENARIOS,
    a_cluster_is_split_before_it_is_founded,
    a_machine_is_cloned,
    an_allotter_crashes_as_it_answers,
    formed,
    record_of,
    several_write_at_once,
    the_founder_leaves_as_soon_as_it_has_founded,
    training_nodes_without_disks_are_deployed_again_and_again,
    writes,
)
from tests.seeds import seeds

SEEDS = 6


@pytest.mark.parametrize("seed", seeds(1, 2))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Scenario, seed: int) -> None:
    scenario(seed)


# --- planted bugs -----------------------------------------------------------------------------------------------------------


def a_gift_is_sent_before_it_is_recorded(patch: pytest.MonkeyPatch) -> None:
    """R12: the allotter forgets, with a crash, that a block is not its own any more."""
    original = WriterBook.give

    def give(self: WriterBook, asker: int, held: tuple[int, ...], steward: bool = False) -> tuple[int, ...]:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(NodeRecord, "save", lambda _self: None)
            return original(self, asker, held, steward)

    patch.setattr(WriterBook, "give", give)


def a_second_nonce_is_merged(patch: pytest.MonkeyPatch) -> None:
    """R12: an id that is bound to another nonce is taken for the same writer."""
    patch.setattr(WriterBook, "check", lambda *_args: None)


def everybody_founds(patch: pytest.MonkeyPatch) -> None:
    """R12: each training node takes all ids with its first step, whoever else is there."""
    patch.setattr(Allotment, "_may_found", lambda _self, _now: True)
    patch.setattr(WriterBook, "founded", property(lambda self: bool(self._record.blocks)))


def who_comes_next_founds_unasked(patch: pytest.MonkeyPatch) -> None:
    """R12: when the training node that came first is gone, the next one founds what it may have founded."""
    patch.setattr(Allotment, "_outlived", lambda _self, _now: False)


def who_is_silent_does_not_count(patch: pytest.MonkeyPatch) -> None:
    """R12: on each side of a split the training node that comes first there founds."""
    original = Allotment._first_trainer
    patch.setattr(Allotment, "_first_trainer", lambda self, now, _among=None: original(self, now))


def a_used_block_is_given(patch: pytest.MonkeyPatch) -> None:
    """R12: what is given away stays the giver's own, too."""
    original = WriterBook.give

    def give(self: WriterBook, asker: int, held: tuple[int, ...], steward: bool = False) -> tuple[int, ...]:
        blocks = original(self, asker, held, steward)
        self._record.blocks.update(dict.fromkeys(blocks))
        self._record.save()
        return blocks

    patch.setattr(WriterBook, "give", give)


def a_training_node_is_given_half(patch: pytest.MonkeyPatch) -> None:
    """It loses so much with its disk."""
    give = WriterBook.give
    patch.setattr(WriterBook, "give", lambda self, asker, held, _steward=False: give(self, asker, held, True))


def a_writer_without_memory_goes_on(patch: pytest.MonkeyPatch) -> None:
    """R4: ids are not written down before they are used, and with its memory a node forgets which it had."""
    original = WriterBook.free_id

    def free_id(self: WriterBook, keyspaces: list[int], _seen: tuple[int, ...] = ()) -> int | None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self._record, "bindings", {})
            return original(self, keyspaces)

    patch.setattr(WriterBook, "free_id", free_id)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (a_gift_is_sent_before_it_is_recorded, an_allotter_crashes_as_it_answers),
        (a_second_nonce_is_merged, a_machine_is_cloned),
        (everybody_founds, several_write_at_once),
        (who_is_silent_does_not_count, a_cluster_is_split_before_it_is_founded),
        (who_comes_next_founds_unasked, the_founder_leaves_as_soon_as_it_has_founded),
        (a_training_node_is_given_half, training_nodes_without_disks_are_deployed_again_and_again),
        (a_used_block_is_given, an_allotter_crashes_as_it_answers),
        (a_writer_without_memory_goes_on, several_write_at_once),
    ],
    ids=lambda function: function.__name__,
)
def test_the_simulator_catches(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)


# --- the book ---------------------------------------------------------------------------------------------------------------


def book(ledger: MemoryLedger | None = None) -> WriterBook:
    return WriterBook(NodeRecord.load(ledger or MemoryLedger()), random.Random(1))


def test_the_founder_has_all_ids_and_each_is_used_once() -> None:
    ledger = MemoryLedger()
    founder = book(ledger)
    founder.found()
    ids = [founder.grant(5, [3])[0] for _ in range(5)]
    assert ids == [0, 1, 2, 4, 5]
    assert founder.grant(6, [])[0] == 0, "ids are of one model"
    assert book(ledger).grant(5, [3])[0] == 6, "it forgot what it had used"
    assert founder.cluster % 2 == 0


def test_blocks_are_given_until_one_is_left() -> None:
    founder, given = book(), set[int]()
    founder.found()
    founder.grant(5, [])
    for asker in range(1, 2 * BLOCKS):
        left = len(founder.blocks)
        blocks = founder.give(asker, (), steward=asker % 100 == 1)
        assert not given & set(blocks)
        assert len(blocks) <= ((left - 1) // 2 if asker % 100 == 1 else 1)
        assert asker > 1 or len(blocks) == (BLOCKS - 1) // 2
        given |= set(blocks)
    assert len(founder.blocks) >= 2, "the block in use, and one more for itself"
    assert len(given) + len(founder.blocks) == BLOCKS
    assert founder.give(2 * BLOCKS, ()) == ()


def test_who_asks_again_is_given_the_same_blocks_until_it_has_them() -> None:
    ledger = MemoryLedger()
    founder = book(ledger)
    founder.found()
    blocks = founder.give(7, ())
    assert book(ledger).give(7, ()) == blocks
    more = founder.give(7, blocks)
    assert more
    assert not set(more) & set(blocks)


def test_all_ids_of_a_node_may_be_used_up() -> None:
    one = book()
    one.take([3], 0)
    one.note_founded()
    one.adopt_cluster(4)
    assert [one.grant(5, [])[0] for _ in range(BLOCK_IDS)] == list(range(3 * BLOCK_IDS, 4 * BLOCK_IDS))
    with pytest.raises(LocalProtocolError, match="no writer id left"):
        one.grant(5, [])


def test_blocks_come_back_to_who_gave_them_away() -> None:
    """The founder uses up what it kept, and all that the steward has came from it."""
    founder, steward = book(), WriterBook(NodeRecord.load(MemoryLedger()), random.Random(2))
    founder.found()
    steward.take(founder.give(steward.holder, (), steward=True), 0)
    for asker in range(1, BLOCKS):
        founder.give(asker, ())
    while founder.free_id([5]) is not None:
        founder.grant(5, [])
    (back,) = steward.give(founder.holder, founder.blocks)
    founder.take((back,), 0)
    assert founder.free_id([5]) == back * BLOCK_IDS
    assert back not in steward.blocks
    assert steward.give(founder.holder, founder.blocks) != (back,)


def test_an_answer_that_is_repeated_does_not_bring_back_what_was_passed_on() -> None:
    cluster = form(1)
    formed(cluster)
    writes(cluster, "t1")
    allotment = machine_of(cluster, "t1")._allotment
    core = allotment._core
    grant = BlockGrant(core.writers.cluster, core.writers.holder, tuple(core.writers.blocks), 0, True)
    link = next(iter(core.links.values()))
    (given,) = core.writers.give(777, ())
    assert given in grant.blocks
    allotment.on_grant(link, grant, cluster.now())
    assert given not in core.writers.blocks


def test_larger_blocks_of_an_earlier_build_stay_in_the_same_hands() -> None:
    """R12: with its numbers read as those of small blocks, two nodes would use one id."""
    ledgers = MemoryLedger(), MemoryLedger()
    for ledger, blocks, given in ((ledgers[0], [0, 2], [(1, 7)]), (ledgers[1], [1], [])):
        record = NodeRecord.load(ledger)
        record.cluster = 4
        record.save()
        state = msgpack.unpackb(ledger.load())
        del state["block_ids"]
        ledger.save(msgpack.packb(state | {"blocks": blocks, "given": given}))
    for _ in range(2):
        first, second = (book(ledger) for ledger in ledgers)
        ids = [{block * BLOCK_IDS + one for block in chosen.blocks for one in range(BLOCK_IDS)} for chosen in (first, second)]
        assert ids == [{*range(16), *range(32, 48)}, set(range(16, 32))]
        first._record.save()
        assert {block * BLOCK_IDS for block in first.give(7, ())} == set(range(16, 32, BLOCK_IDS))


def test_a_second_nonce_is_refused() -> None:
    one = book()
    one.learn(5, [(1, 77)])
    one.learn(5, [(1, 77)])
    with pytest.raises(WriterConflictError, match="bound to nonce 000000000000004d, refused 0000000000000042"):
        one.check(5, 1, 66)
    assert one.nonce_of(5, 1) == 77


def test_a_writer_starts_above_what_the_giver_of_its_ids_had_seen() -> None:
    """R5, also when it crashes before it uses one."""
    cluster = form(1)
    formed(cluster)
    cluster.shift_clock("t1", 20_000)
    first = writes(cluster, "t1")
    cluster.add("t2", "eu", "train", ["t1"])
    cluster.shift_clock("t2", -8_000)
    assert cluster.run_until(lambda: bool(record_of(cluster.nodes["t2"]).blocks))
    cluster.crash("t2")
    cluster.crash("t1")
    cluster.restart("t2", keep_state=False)
    assert writes(cluster, "t2", 60_000) > first
    at_rest(cluster)


def test_a_node_alone_that_others_call_from_their_cluster_stops_and_says_what_to_do() -> None:
    """It lost its run_dir, has no seeds, and publishes before anybody who knew it calls."""
    cluster = form(1)
    formed(cluster)
    writes(cluster, "t1")
    cluster.run(3_000)  # heartbeats tell the others which cluster it is
    node = cluster.nodes["t1"]
    assert node.machine is not None
    cluster.feed(node, node.machine, Leaving())
    cluster.run(50)
    cluster.crash("t1")
    node.ledger = MemoryLedger()
    cluster.cut |= {(name, "t1") for name in cluster.nodes}
    cluster.restart("t1", keep_state=False)
    writes(cluster, "t1")
    cluster.cut = set()
    assert cluster.run_until(lambda: node.fatal != "", 30_000), "it goes on in a cluster of its own"
    assert "Remove its run_dir, give it seeds, start it again" in node.fatal
