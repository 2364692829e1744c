"""By which protocol a cluster keeps its replicas equal: the product's own, or a step on the paper's way to it.

The paper (Ekko, OSDI '22, sections 4.3 to 4.5) has no push: every interval each replica pulls. Its ablation adds one idea at a
time, and so do these presets, on the same machine and the same store:

| preset | what it adds | where |
|---|---|---|
| `VECTOR` | pull from a random peer; what it lacks is found by a scan | `p2p.pulling.pull`, `p2p.paper.schedule` |
| `CACHE` | found in the update cache | `ekko.store.recent` |
| `SHARD_VERSIONS` | vectors only of shards whose version differs; the freshest peer | `shard_versions`, `rounds` |
| `LEADERS` | a region pulls a shard from others once | `p2p.paper.leaders` |
| `PUSH` | the product: fresh batches down trees, pulls only where something shows one due | `p2p.pushing`, `p2p.pulling` |

In all of them but the last, who got something asks again at once; and what is new of shard versions is told to whoever asked
and is waiting for it, at the next moment and not at the next interval (docs/decisions/0015).

All nodes of a cluster must run the same one. Operators are not offered the choice (docs/decisions/0014): the simulator is.
"""

from dataclasses import dataclass
from typing import Final

# The paper does not publish its interval. It is to be well below the seconds that the paper reports, and above a round trip.
INTERVAL_MS: Final = 200


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """What takes part in keeping replicas equal.

    Raises:
        ValueError: they do not fit together, or nothing would.
    """

    push: bool = True  # fresh batches travel down the trees
    cache: bool = True  # answers come from the update cache where it reaches back far enough; else always from a scan
    shard_versions: bool = False  # versions before vectors; with push they would almost never match (R9)
    leaders: bool = False  # of each region and shard one node pulls across regions, the others from it
    interval_ms: int = 0  # of regular pulls; 0: a pull starts only when something shows that one is due
    follow: bool = False  # whoever got something asks again at once, and only who did not waits for its interval
    held: bool = False  # a question about versions of which none is new waits where it is, for an interval at most

    def __post_init__(self) -> None:
        if not self.push and self.interval_ms <= 0:
            raise ValueError("without push, pulls need an interval_ms above 0")
        if self.push and self.shard_versions:
            raise ValueError("shard versions almost never match while push moves vectors: choose one of push, shard_versions")
        if self.leaders and not self.shard_versions:
            raise ValueError("leaders pull single shards, which only rounds by shard versions can: set shard_versions")
        if self.held and not (self.shard_versions and self.follow):
            raise ValueError("only questions about versions can be held, and rounds must follow: set shard_versions and follow")


VECTOR: Final = SyncOptions(push=False, cache=False, interval_ms=INTERVAL_MS, follow=True)
CACHE: Final = SyncOptions(push=False, interval_ms=INTERVAL_MS, follow=True)
SHARD_VERSIONS: Final = SyncOptions(push=False, shard_versions=True, interval_ms=INTERVAL_MS, follow=True, held=True)
LEADERS: Final = SyncOptions(push=False, shard_versions=True, leaders=True, interval_ms=INTERVAL_MS, follow=True, held=True)
PUSH: Final = SyncOptions()

# In the order of the paper's ablation; the last is the product.
PRESETS: Final = {"vector": VECTOR, "cache": CACHE, "shard_versions": SHARD_VERSIONS, "leaders": LEADERS, "push": PUSH}
