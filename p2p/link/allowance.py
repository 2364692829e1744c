"""How much work one peer may have us do: small questions whose answers are large."""

from dataclasses import dataclass, field

# A pull may cost a scan of all rows. A peer has one of a keyspace on its way at a time, so it asks once a round trip at most,
# and rarely does; so many at once are selected for it, and then one in so many milliseconds.
SELECTIONS_MAX = 32
SELECTION_MS = 20
# A question of a round by shard versions looks at vectors and not at rows, and rounds follow each other closely: it counts so
# much, and so much more for as many shards as it is about. What a peer can make us list is 12 MB/s.
ROUND_MS = 2
ROUND_SHARDS_PER_MS = 1_024
# The schema, the register and a hello are large answers to small messages. A correct peer causes each once a beat at most, so
# each is sent to it once in so long; what is left out comes at its next beat.
ANSWER_MS = 250


@dataclass(slots=True)
class Allowance:
    """Of one life of a peer. Milliseconds are monotonic."""

    _answered_ms: dict[str, int] = field(default_factory=dict)  # by kind: when the last large answer of it went
    _selections: dict[int, int] = field(default_factory=dict)  # by keyspace: until when those made for the peer are paid

    def admits_selection(self, keyspace: int, now_ms: int, cost_ms: int = SELECTION_MS) -> bool:
        """Whether the peer may have one more selection made, of a keyspace that we hold; counts it if so."""
        until_ms = max(self._selections.get(keyspace, now_ms), now_ms)
        if until_ms - now_ms >= SELECTIONS_MAX * SELECTION_MS:
            return False
        self._selections[keyspace] = until_ms + cost_ms
        return True

    def admits_answer(self, kind: str, now_ms: int) -> bool:
        """Whether the peer may have another large answer of this kind; counts it if so."""
        if now_ms - self._answered_ms.get(kind, -ANSWER_MS) < ANSWER_MS:
            return False
        self._answered_ms[kind] = now_ms
        return True

    def charge_shards(self, keyspace: int, shards: int) -> None:
        """What was admitted turned out to be about so many shards."""
        self._selections[keyspace] = self._selections.get(keyspace, 0) + shards // ROUND_SHARDS_PER_MS

    def forget_keyspace(self, keyspace: int) -> None:
        """It was dropped."""
        self._selections.pop(keyspace, None)
