"""Requests whose ids go together across tables, as those of people and items do; and the same ids with that taken away.

A request asks for one row of each of `TABLES` tables. The generator:

    tables     the sizes of Criteo's 26 categorical fields; popularity within each is a bounded power law (`exponent`)
    kinds      of requests (a group of people in front of a group of items): each has `choices` ids in every table, drawn by
               the table's popularity, and its own popularity is a bounded power law, too. A request is of a kind with
               probability `together`: then each table takes one of the kind's ids, but a share `stray` of them any id
    the rest   every table on its own, by popularity
    strangers  such a share of the requests is of people and items that are new: in each table with many rows the id is one
               never seen before, with probability `fresh`
    again      with that probability a request has the ids of one of the `again_within` before it: the same person again
    drift      every `drift_requests`, a share `drift_share` of the kinds changes places in popularity
    regions    a share `own` of a region's requests goes by the region's own order of the kinds, the rest by one that all share

`independent` and `shuffled` are the controls. They hold the very same ids equally often, table by table:

    independent  each table's column is permuted within windows: the tables know nothing of each other, popularity and
                 drift are as they were
    shuffled     whole requests are permuted within the windows: the ids still go together
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# Rows of the 26 categorical fields of Criteo's Kaggle set.
CRITEO_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
TABLES = len(CRITEO_ROWS)
FRESH_ROWS_MIN = 10_000
KEY_SHIFT = 40  # a key is its table's number above 40 bits of the id within it

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What the generator is given; the defaults are fitted to the figures of the real sample, see `docs/gpu-hit-rates.md`."""

    requests: int = 120_000
    rows_max: int = 1 << 30  # of a table; below the sizes above only under test
    exponent: float = 1.25
    kinds: int = 6_000
    kind_exponent: float = 0.8
    choices: int = 2
    together: float = 0.85
    stray: float = 0.05
    strangers: float = 0.3
    fresh: float = 0.9
    again: float = 0.02
    again_within: int = 500
    drift_requests: int = 10_000
    drift_share: float = 0.02
    own: float = 0.5
    regions: int = 4  # whose requests train the model; one of them is served here


def ranks(rng: np.random.Generator, count: int, rows: int, exponent: float) -> Ids:
    """int64[count] in [0, rows): bounded Pareto by its inverse distribution function, rounded down."""
    power = 1.0 - exponent
    if abs(power) < 1e-9:
        power = 1e-9
    u = rng.random(count)
    x = (1.0 - u * (1.0 - (rows + 1.0) ** power)) ** (1.0 / power)
    return np.minimum(x.astype(np.int64) - 1, rows - 1)


class World:
    """What all regions share: tables, kinds of requests, and the ids that are used up for fresh ones."""

    def __init__(self, options: TraceOptions, seed: int) -> None:
        self.options = options
        self._rng = np.random.default_rng(seed)
        self.rows = np.minimum(CRITEO_ROWS, options.rows_max)
        count = options.kinds * options.choices
        drawn = [ranks(self._rng, count, int(rows), options.exponent) for rows in self.rows]
        self._ids = np.stack(drawn, axis=1).reshape(options.kinds, options.choices, TABLES)
        self._next_fresh = self.rows.astype(np.int64)
        self._order = self._rng.permutation(options.kinds)
        self._own_orders: dict[int, Ids] = {}

    def requests(self, count: int, region: int) -> Ids:
        """int64[count, TABLES] keys of the next requests of a region."""
        o, rng = self.options, self._rng
        if region not in self._own_orders:
            self._own_orders[region] = rng.permutation(o.kinds)
        ids = np.stack([ranks(rng, count, int(rows), o.exponent) for rows in self.rows], axis=1)
        drawn = ranks(rng, count, o.kinds, o.kind_exponent)
        kind = np.where(rng.random(count) < o.own, self._own_orders[region][drawn], self._order[drawn])
        choice = rng.integers(0, o.choices, (count, TABLES))
        of_kind = self._ids[kind[:, None], choice, np.arange(TABLES)]
        takes = (rng.random(count) < o.together)[:, None] & (rng.random((count, TABLES)) >= o.stray)
        ids = np.where(takes, of_kind, ids)
        fresh = (rng.random(count) < o.strangers)[:, None] & (rng.random((count, TABLES)) < o.fresh)
        fresh[:, self.rows < FRESH_ROWS_MIN] = False  # a table of few rows (countries, weekdays) gets no new ones
        numbers = np.cumsum(fresh, axis=0) - 1
        ids = np.where(fresh, self._next_fresh + numbers, ids)
        self._next_fresh += fresh.sum(axis=0)
        back = np.arange(count) - rng.integers(1, o.again_within + 1, count)
        repeats = (rng.random(count) < o.again) & (back >= 0)
        ids[repeats] = ids[back[repeats]]
        return ids + (np.arange(TABLES, dtype=np.int64) << KEY_SHIFT)

    def drift(self) -> None:
        """Let some kinds change places in popularity, here and in every region."""
        o, rng = self.options, self._rng
        moved = max(2, int(o.kinds * o.drift_share))
        for order in (self._order, *self._own_orders.values()):
            places = rng.choice(o.kinds, moved, replace=False)
            order[places] = order[rng.permutation(places)]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one region serves, in time order, and what the other regions serve meanwhile.

    Args:
        served: int64[requests, TABLES] keys.
        elsewhere: int64[requests * (regions - 1), TABLES] keys; of as long a time.
    """

    served: Ids
    elsewhere: Ids


def correlated(options: TraceOptions, seed: int) -> Trace:
    """Generate a trace; one seed gives one trace."""
    world = World(options, seed)
    served, elsewhere = [], []
    for begin in range(0, options.requests, options.drift_requests):
        count = min(options.drift_requests, options.requests - begin)
        served.append(world.requests(count, region=0))
        others = np.stack([world.requests(count, region) for region in range(1, options.regions)], axis=1)
        elsewhere.append(others.reshape(-1, TABLES))
        world.drift()
    return Trace(np.concatenate(served), np.concatenate(elsewhere))


def independent(keys: Ids, window: int, seed: int) -> Ids:
    """The same keys, equally often, each column permuted on its own within windows of so many requests."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permuted(keys[begin : begin + window], axis=0) for begin in range(0, len(keys), window)])


def shuffled(keys: Ids, window: int, seed: int) -> Ids:
    """The same requests, in another order within windows of so many."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(keys[begin : begin + window]) for begin in range(0, len(keys), window)])


def concentration(keys: Ids, share: float = 0.01) -> float:
    """Which share of all accesses the most popular `share` of the distinct keys takes."""
    counts = np.sort(np.unique(keys, return_counts=True)[1])[::-1]
    return float(counts[: max(1, round(share * counts.size))].sum() / counts.sum())


def small(options: TraceOptions) -> TraceOptions:
    """The tiny size that runs under test."""
    return replace(options, requests=320, kinds=100, drift_requests=80)
