"""What a node remembers of its peers, and when it is written down."""

from dataclasses import dataclass

from p2p.ledger import FIRST_PEERS, NodeRecord, Peer


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
