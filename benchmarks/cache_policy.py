"""`cache-policy`: what share of look-ups, and of whole requests, a cache of 5 % or 10 % of the rows serves.

The cache is the one on a device by its exact semantics (`gpu.reference`), replayed batch by batch: look up, then insert what
was missed. Beside it the same policy without buckets, and EVStore's, which the cache does not have yet. Three traces hold the
same ids equally often: as they go together (`correlated`), as whole requests in another order (`shuffled`), and with each
table on its own (`independent`); see `benchmarks/hit_rates/traces.py`. A whole request is one all of whose rows are in the
cache: no other is served without the host.

    traces    trace x capacity x policy
    policies  without buckets, on the correlated and on the independent trace: which policy is best depends on the trace
    updates   rows that training changed come, too: those of this region's requests a moment later (`own`), or of all four
              regions (`all`); `assign` changes what is there, `insert` keeps every row that comes
    ticks     LRU, if so many rows are inserted within one tick of the clock, as a share of the capacity
    decays    LFU, if uses count half every so many look-ups per row that the cache holds; 0: never. `moved`: the share of
              the kinds of requests that changes places in popularity every 10,000 requests
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Figure
from benchmarks.hit_rates.ideal import IdealCache, Tally
from benchmarks.hit_rates.real import ReferenceCache
from benchmarks.hit_rates.traces import TABLES, TraceOptions, concentration, correlated, independent, shuffled, small

TARGETS: dict[str, str] = {
    "buckets_cost_max": "<= 0.01",  # of the hit rate, against no buckets
    "assign_cost_max": "<= 0",  # of assigning where a row is present, against no updates: none at all
    "whole_hidden": ">= 10",  # how many times as many whole requests hit as when the tables know nothing of each other
}
BATCH, BATCH_QUICK = 64, 8  # requests looked up together
TRAIN_DELAY = 16  # batches until a request that was served has been trained on
CAPACITIES = (0.05, 0.10)
TICKS = (1, 16, 64, 256)  # batches
DECAYS = (0, 9, 25, 50, 100)  # look-ups per row of the capacity
MOVED = (0.02, 0.25)
POLICIES = ("lru", "lfu")
SEED = 1

Ids = NDArray[np.int64]
Cell = dict[str, float | int | str]


class Replay:
    """Requests by dense numbers of their keys, and their replay through a cache."""

    def __init__(self, served: Ids, batch: int, elsewhere: Ids | None = None) -> None:
        """`served` is asked for here, `elsewhere` in other regions meanwhile."""
        self.batch = batch
        parts = [served, served[:0] if elsewhere is None else elsewhere]
        self.keys, numbers = np.unique(np.concatenate(parts), return_inverse=True)
        self.served, self.elsewhere = np.split(numbers.reshape(-1, served.shape[1]), [len(served)])
        self.distinct = np.unique(self.served).size

    def capacity(self, share: float) -> int:
        """So many rows are this share of those that the trace asks for."""
        return max(1, round(share * self.distinct))

    def ideal(self, share: float, policy: str) -> IdealCache:
        """A cache without buckets, of this share of the rows."""
        return IdealCache(self.keys.size, self.capacity(share), policy)

    def real(self, share: float, policy: str, tick_batches: int = 1, decay_batches: int = 0) -> ReferenceCache:
        """The cache of a device, likewise."""
        return ReferenceCache(self.keys, self.capacity(share), policy, tick_batches, decay_batches)

    def run(self, cache: "IdealCache | ReferenceCache", updates: str = "none", keep: bool = False, warm: float = 0.5) -> Tally:
        """Replay all; hits count after the share `warm`. With `updates`, those of a batch come after its look-up."""
        tally = Tally()
        others = len(self.elsewhere) // len(self.served)
        for number, begin in enumerate(range(0, len(self.served), self.batch)):
            hit = cache.look_up(self.served[begin : begin + self.batch])
            if begin >= warm * len(self.served):
                tally.add(hit)
            if updates == "none" or number < TRAIN_DELAY:
                continue
            ago = begin - TRAIN_DELAY * self.batch
            trained = [self.served[ago : ago + self.batch]]
            if updates == "all":
                trained.append(self.elsewhere[others * begin : others * (begin + self.batch)])
            cache.update(np.unique(np.concatenate(trained)), keep)
        return tally


def run(quick: bool) -> dict[str, Figure]:
    """Replay every cell."""
    options = small(TraceOptions()) if quick else TraceOptions()
    batch = BATCH_QUICK if quick else BATCH
    trace = correlated(options, SEED)
    served, window = trace.served, options.drift_requests
    replays = {
        "correlated": Replay(served, batch),
        "shuffled": Replay(shuffled(served, window, SEED), batch),
        "independent": Replay(independent(served, window, SEED), batch),
    }
    cells = [
        _cell(name, replay, share, policy) for name, replay in replays.items() for share in CAPACITIES for policy in POLICIES
    ]
    everywhere = Replay(served, batch, trace.elsewhere)
    updates = [cell for share in CAPACITIES for policy in POLICIES for cell in _updates(everywhere, share, policy)]
    return {
        **_headline(cells, updates),
        "requests": options.requests,
        "keys_distinct": replays["correlated"].distinct,
        "hottest_1pct_share": concentration(served),
        "traces": cells,
        "policies": [_policies(replays, share) for share in CAPACITIES],
        "updates": updates,
        "ticks": [_ticks(replays["correlated"], batches) for batches in TICKS],
        "decays": [cell for moved in MOVED for cell in _decays(replace(options, drift_share=moved), batch)],
    }


def _cell(name: str, replay: Replay, share: float, policy: str) -> Cell:
    real, ideal = replay.run(replay.real(share, policy)), replay.run(replay.ideal(share, policy))
    return {
        "trace": name,
        "capacity": share,
        "policy": policy,
        "hit": real.hit_rate,
        "hit_no_buckets": ideal.hit_rate,
        "whole": real.whole_rate,
        "whole_no_buckets": ideal.whole_rate,
    }


def _updates(replay: Replay, share: float, policy: str) -> list[Cell]:
    found: list[Cell] = []
    for updates, keep in (("none", False), ("own", False), ("own", True), ("all", False), ("all", True)):
        cache = replay.real(share, policy)
        tally = replay.run(cache, updates, keep)
        rule = "insert" if keep else "assign"
        cell: Cell = {"capacity": share, "policy": policy, "updates": updates, "rule": "-" if updates == "none" else rule}
        found.append(cell | {"hit": tally.hit_rate, "whole": tally.whole_rate, "rows_written": cache.written})
    return found


def _ticks(replay: Replay, batches: int) -> Cell:
    share = CAPACITIES[0]
    tally = replay.run(replay.real(share, "lru", tick_batches=batches))
    inserted = (1 - tally.hit_rate) * batches * replay.batch * TABLES
    return {"inserted_a_tick": inserted / replay.capacity(share), "hit": tally.hit_rate, "whole": tally.whole_rate}


def _decays(options: TraceOptions, batch: int) -> list[Cell]:
    replay, share = Replay(correlated(options, SEED).served, batch), CAPACITIES[0]
    found: list[Cell] = []
    for look_ups in DECAYS:
        batches = -(-look_ups * replay.capacity(share) // (batch * TABLES))
        tally = replay.run(replay.real(share, "lfu", decay_batches=batches))
        found.append({"moved": options.drift_share, "look_ups": look_ups, "hit": tally.hit_rate, "whole": tally.whole_rate})
    return found


def _policies(replays: dict[str, Replay], share: float) -> Cell:
    found: Cell = {"capacity": share}
    for name in ("correlated", "independent"):
        for policy in (*POLICIES, "evlfu"):
            found[f"{name}_{policy}_whole"] = replays[name].run(replays[name].ideal(share, policy)).whole_rate
    return found


def _headline(cells: list[Cell], updates: list[Cell]) -> dict[str, Figure]:
    whole = {(cell["trace"], cell["capacity"], cell["policy"]): float(cell["whole"]) for cell in cells}
    together, alone = (whole[trace, CAPACITIES[0], "lru"] for trace in ("correlated", "independent"))
    return {
        "buckets_cost_max": max(float(cell["hit_no_buckets"]) - float(cell["hit"]) for cell in cells),
        "whole_hidden": together / max(alone, 1e-9),
        "assign_cost_max": _cost_max(updates, "assign", "hit"),
        "insert_cost_max": _cost_max(updates, "insert", "hit"),
        "insert_whole_cost_max": _cost_max(updates, "insert", "whole"),
    }


def _cost_max(updates: list[Cell], rule: str, figure: str) -> float:
    """By how much the figure is lower with updates than without, at most."""
    without = {(cell["capacity"], cell["policy"]): float(cell[figure]) for cell in updates if cell["updates"] == "none"}
    return max(without[cell["capacity"], cell["policy"]] - float(cell[figure]) for cell in updates if cell["rule"] == rule)
