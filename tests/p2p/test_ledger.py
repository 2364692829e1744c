"""What a node remembers of its peers, and when it is written down."""

from dataclasses import dataclass

import numpy as np

from p2p.identity.ledger import FIRST_PEERS, NodeRecord, Peer
from p2p.messages import FLOORED, FROZEN, Retired


@dataclass
class CountedLedger:
    """In memory; counts what reaches it."""

    record: bytes | None = None
    saves: int = 0

    def load(self) -> bytes | None:
        return self.record

    def save(self, record: bytes) -> None:
        self.record = record
        self.saves += 1


def peer(number: int) -> Peer:
    return Peer(f"n{number}", "eu", "serve", f"virtual://n{number}")


def test_the_first_peers_survive_at_once_and_the_others_from_the_next_beat_on() -> None:
    ledger = CountedLedger()
    ours = NodeRecord.load(ledger)
    for number in range(300):
        ours.meet(peer(number))
        ours.meet(peer(number))
        assert len(NodeRecord.load(ledger).peers) == min(number + 1, FIRST_PEERS)
    assert ledger.saves == FIRST_PEERS, "a start of many is not a write each"
    ours.save_peers()
    assert NodeRecord.load(ledger).peers == ours.peers
    ours.save_peers()
    assert ledger.saves == FIRST_PEERS + 1, "nothing has changed since"
    ours.part("n7")
    ours.save_peers()
    assert "n7" not in NodeRecord.load(ledger).peers


def test_floors_of_a_keyspace_that_was_made_anew_are_dropped() -> None:
    ours = NodeRecord.load(CountedLedger())
    for writer, shards in ((1, 8), (2, 64), (3, 0)):
        one = Retired(5, 5, writer, 100 + writer, FLOORED if shards else FROZEN, np.ones(shards, np.uint64))
        ours.retired[one.key] = one
    before = ours.retired_digest()
    assert ours.drop_floors(5, 64)
    assert sorted(one.writer for one in ours.retired.values()) == [2, 3]
    assert ours.retired_digest() != before
    assert not ours.drop_floors(5, 64)
    assert not ours.drop_floors(6, 8)
