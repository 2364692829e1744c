"""Which keys of a table are asked for: what readers count, folded by the daemon into a picture that fades.

Two files a table (`ekko.store.layout`). Readers add to the *hot* file: a count-min sketch, and places for which the candidates
for the hottest keys compete. It is the one file that other users than the daemon's may write, and nothing in it is trusted: the
daemon copies it with a read, never through its mapping, so that not even a file cut short can hurt it; a counter that went
back, or too far forward, counts as unchanged. The worst that a bad reader can do is to make keys look hot.

The *heat* file is the daemon's own: at each fold it fades by half per half-life, and what was counted since is added. It
outlives the daemon, as the rows do.
"""

from dataclasses import dataclass
from pathlib import Path
from secrets import randbits

import numpy as np
from numpy.typing import NDArray

from ekko.errors import StoreError
from ekko.store import layout
from ekko.store.kernels import hot as kernels
from ekko.store.memory import Mapping, Memory

U64 = NDArray[np.uint64]
F64 = NDArray[np.float64]

# Rows of a table for one counter in a row of its sketch: keys of about that rank can still be told from those nobody reads.
ROWS_PER_CELL = 16
# Of the table's requests in a half-life. What has less was asked for once, long ago, and is noise.
REQUESTS_MIN = 0.5

_CANDIDATES = layout.HOT.offset("candidates")
_CELLS = layout.HOT.offset("cells")
_COUNTS = ("lookups", "keys", "misses")


def width_log2_for(capacity_rows: int) -> int:
    """The width of the sketch of a table that is to have so many rows."""
    wanted = max(1, capacity_rows // ROWS_PER_CELL) - 1
    return min(max(wanted.bit_length(), layout.HOT_WIDTH_LOG2_MIN), layout.HOT_WIDTH_LOG2_MAX)


@dataclass(frozen=True, slots=True)
class HotKeys:
    """The hottest keys of a table, hottest first."""

    keys: U64  # uint64[n]
    requests: F64  # float64[n], how often each was asked for; a request a half-life ago counts half


@dataclass(frozen=True, slots=True)
class HeatStats:
    """How much a table is asked for."""

    lookups: int = 0  # calls of readers
    keys: int = 0  # keys they asked for
    misses: int = 0  # of those, absent ones; an estimate from a sample
    requests: float = 0.0  # keys asked for, decayed
    bytes: int = 0  # of shared memory
    counted_by: str = "nobody"  # whose readers may count: those of the node's own user, of its group, or all


class Heat:
    """Both files of one table, as its daemon holds them. Use `attach`."""

    def __init__(self, table_id: int, hot: Mapping, heat: Mapping, width_log2: int) -> None:
        self.width_log2 = width_log2
        self._table_id = table_id
        self._hot = hot
        self._heat = heat
        cells = layout.HOT_DEPTH << width_log2
        begin = layout.HEAT.offset("cells")
        self._faded = heat.words(begin, cells // 2).view(np.float32)
        self._seen = heat.words(begin + 4 * cells, cells // 2).view(np.uint32)
        self._top = heat.words(layout.HEAT.offset("top"), layout.HEAT_TOP)
        self._seed = self._word("seed")[()]

    @classmethod
    def attach(cls, table_id: int, names: tuple[str, str], memory: Memory, capacity_rows: int) -> "Heat":
        """Take over the files that another daemon left, or make them; `names`: of the hot file, and of the heat file.

        Raises:
            StoreError: shared memory is full.
        """
        try:
            heat = memory.open(names[1])
            width_log2 = int(heat.words(layout.HEAT.offset("width_log2"))) if len(heat) >= layout.PAGE_BYTES else 0
            expected = (layout.HEAT_MAGIC, layout.LAYOUT_VERSION, table_id, width_log2)
            sane = layout.HOT_WIDTH_LOG2_MIN <= width_log2 <= layout.HOT_WIDTH_LOG2_MAX
            if not sane or len(heat) != layout.heat_bytes(width_log2) or tuple(heat.words(0, 4).tolist()) != expected:
                raise StoreError("damaged")
            hot = memory.open(names[0])
            if len(hot) != layout.hot_bytes(width_log2):
                raise StoreError("of another length")
        except (StoreError, OSError):
            return cls._create(table_id, names, memory, width_log2_for(capacity_rows))
        heat.ensure(len(heat))
        hot.ensure(len(hot))
        attached = cls(table_id, hot, heat, width_log2)
        attached._write_header()
        return attached

    @classmethod
    def _create(cls, table_id: int, names: tuple[str, str], memory: Memory, width_log2: int) -> "Heat":
        hot = memory.create(names[0], layout.hot_bytes(width_log2))
        heat = memory.create(names[1], layout.heat_bytes(width_log2))
        hot.let_readers_write()
        hot.ensure(len(hot))
        heat.ensure(len(heat))
        heat.words(0, 5)[...] = (layout.HEAT_MAGIC, layout.LAYOUT_VERSION, table_id, width_log2, randbits(64))
        made = cls(table_id, hot, heat, width_log2)
        made._write_header()
        return made

    def _write_header(self) -> None:
        """Say in the hot file what it is, whatever somebody wrote there."""
        fields = (layout.HOT_MAGIC, layout.LAYOUT_VERSION, self._table_id, self.width_log2, int(self._seed), randbits(64) | 1)
        self._hot.write(0, np.array(fields, np.uint64))

    def _word(self, name: str) -> U64:
        return self._heat.words(layout.HEAT.offset(name))

    @property
    def bytes(self) -> int:
        """Of shared memory, both files."""
        return len(self._hot) + len(self._heat)

    @property
    def seed(self) -> int:
        """Of the sketch's hash."""
        return int(self._seed)

    def fold(self, now_ms: int, half_life_ms: float) -> U64:
        """Let what there is fade, and add what readers counted since the last fold. Call it every few seconds.

        Returns:
            uint64[n]: keys that were counted since the last fold, not all of them, and the hottest ones; no repeats.

        Args:
            now_ms: of the machine's monotonic clock.
            half_life_ms: what was counted so long ago counts half.
        """
        content = self._hot.read()
        if len(content) != layout.hot_bytes(self.width_log2):
            self._hot.lengthen()  # somebody cut it short; the next fold sees zeros there
            self._write_header()
            return np.empty(0, np.uint64)
        folded_ms = int(self._word("folded_ms"))
        elapsed_ms = max(0, now_ms - folded_ms) if folded_ms else 0
        decay = 0.5 ** (elapsed_ms / half_life_ms)
        grown = self._fold_counts(content)
        requests = self._word("requests").view(np.float64)
        asked = np.empty(0, np.uint64)
        if grown or requests > REQUESTS_MIN:
            requests[...] = requests * decay + grown
            kernels.fold(content[_CELLS:].view(np.uint32), self._seen, self._faded, decay)
            asked = self._fold_top(content)
        self._write_header()
        self._word("folded_ms")[...] = max(now_ms, 1)
        return asked

    def _fold_counts(self, content: NDArray[np.uint8]) -> int:
        """Add the plain counts up; returns how many keys were asked for."""
        grown = {}
        for name in _COUNTS:
            offset = layout.HOT.offset(name)
            value = int(content[offset : offset + 8].view(np.uint64)[0])
            seen, total = self._word(f"{name}_seen"), self._word(name)
            growth = (value - int(seen)) % (1 << 64)
            grown[name] = growth if growth < 1 << 40 else 0  # went back, or too far forward
            total[...] = (int(total) + grown[name]) % (1 << 63)
            seen[...] = value
        return grown["keys"]

    def _fold_top(self, content: NDArray[np.uint8]) -> U64:
        """Let the candidates of this time, and the hottest keys until now, compete anew; returns all of them."""
        candidates = content[_CANDIDATES:_CELLS].view(np.uint64).reshape(-1, 2)
        some = candidates[candidates[:, 1] != 0, 0]
        keys = np.unique(np.concatenate([some, self._top[: self._top_count]]))
        estimates = self.hotness(keys)
        order = np.argsort(-estimates, kind="stable")[: layout.HEAT_TOP]
        order = order[estimates[order] >= REQUESTS_MIN]
        self._word("top_count")[...] = 0  # a kill in between leaves none, and the candidates come back
        self._top[: order.size] = keys[order]
        self._word("top_count")[...] = order.size
        self._hot.write(_CANDIDATES, np.zeros(2 * layout.HOT_CANDIDATES, np.uint64))
        return keys

    @property
    def _top_count(self) -> int:
        return min(int(self._word("top_count")), layout.HEAT_TOP)

    def hotness(self, keys: U64) -> F64:
        """float64[n]: how often each key was asked for as of the last fold, decayed; never too low but for the sampling.

        Too high by at most e / width of the table's requests, but for one key in 55 (`layout.HOT_DEPTH`).
        """
        out = np.empty(keys.size, np.float64)
        kernels.estimate(self._faded, self.width_log2, self._seed, np.ascontiguousarray(keys, np.uint64), out)
        return out

    def hottest(self, count: int) -> HotKeys:
        """The hottest keys as of the last fold, at most `count` and `layout.HEAT_TOP`; absent ones that are asked for too."""
        keys = self._top[: min(self._top_count, count)].copy()
        return HotKeys(keys, self.hotness(keys))

    def stats(self) -> HeatStats:
        """How much the table is asked for, as of the last fold."""
        lookups, keys, misses = (int(self._word(name)) for name in _COUNTS)
        requests = float(self._word("requests").view(np.float64))
        mode = self._hot.mode
        counted_by = "everybody" if mode & 0o002 else "its user and group" if mode & 0o020 else "its user"
        return HeatStats(lookups, keys, misses, requests, self.bytes, counted_by)


def open_to_count(path: Path, table_id: int) -> tuple[Mapping, int] | None:
    """A reader's mapping of the hot file, and its width; None: it is not there, not ours to write, or makes no sense."""
    try:
        mapping = Mapping.open_to_count(path)
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    if len(mapping) < layout.PAGE_BYTES:
        return None
    magic, version, table, width_log2 = mapping.words(0, 4).tolist()
    if (magic, version, table) != (layout.HOT_MAGIC, layout.LAYOUT_VERSION, table_id):
        return None
    if not layout.HOT_WIDTH_LOG2_MIN <= width_log2 <= layout.HOT_WIDTH_LOG2_MAX:
        return None
    return (mapping, width_log2) if len(mapping) == layout.hot_bytes(width_log2) else None
