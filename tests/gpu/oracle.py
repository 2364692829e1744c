"""What a cache does, in dictionaries and loops, one key a time: the third telling, beside the kernels and `gpu.reference`."""

from dataclasses import dataclass

import numpy as np

from ekko import codec as store_codec
from gpu import layout
from gpu.evicting import policy_of
from gpu.layout import Shape

MASK = 2**64 - 1


def hash_of(key: int) -> int:
    mixed = (key + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


@dataclass
class Entry:
    key: int
    stamp: int
    score: int
    row: bytes


class Oracle:
    """A cache of `shape`; batches may repeat keys, and need no order."""

    def __init__(self, shape: Shape, policy: str) -> None:
        self.shape = shape
        self.policy = policy_of(policy)
        self.buckets: list[list[Entry | None]] = [[None] * 32 for _ in range(shape.buckets)]
        self.where: dict[int, tuple[int, int]] = {}
        self.counts = dict.fromkeys(
            [
                "looked_up",
                "missed",
                "crossed",
                "absent",
                "assigned",
                "kept",
                "inserted",
                "replaced",
                "refused",
                "erased",
                "evicted",
            ],
            0,
        )

    def get(self, key: int) -> Entry | None:
        if key not in self.where:
            return None
        bucket, place = self.where[key]
        return self.buckets[bucket][place]

    def lookup(self, keys: list[int], tick: int) -> tuple[np.ndarray, list[int], list[int]]:
        """Rows, stamps, indices of missed keys."""
        rows = np.zeros((len(keys), self.shape.dim), np.float32)
        stamps, missed = [0] * len(keys), []
        for i, key in enumerate(keys):
            if entry := self.get(key):
                rows[i] = self.decoded(entry)
                stamps[i] = entry.stamp
                self._use(entry, tick)
            else:
                missed.append(i)
        self.counts["looked_up"] += len(keys)
        self.counts["missed"] += len(missed)
        return rows, stamps, missed

    def pooled(self, keys: list[int], offsets: list[int], weights: list[float] | None, mode: str, tick: int) -> np.ndarray:
        rows, _, missed = self.lookup(keys, tick)
        out = np.zeros((len(offsets) - 1, self.shape.dim), np.float32)
        for bag in range(len(out)):
            first, last = offsets[bag], offsets[bag + 1]
            for i in range(first, last):
                if i not in missed:
                    out[bag] += rows[i] if weights is None else rows[i] * np.float32(weights[i])
            if mode == "mean" and last > first:
                out[bag] /= np.float32(last - first)
        return out

    def apply(self, batch: list[Entry]) -> None:
        for new in _newest(batch):
            here = self.get(new.key)
            self._assign(here, new)
            self.counts["absent"] += here is None

    def insert(self, batch: list[Entry], *, scored: bool, tick: int) -> None:
        for new in _newest(batch):
            if not scored:
                new.score = self.policy.first_score(tick)
            here = self.get(new.key)
            if here:
                self._assign(here, new)
                if scored:
                    here.score = new.score
                continue
            number = hash_of(new.key) * self.shape.buckets >> 64
            bucket = self.buckets[number]
            if None in bucket:
                place = bucket.index(None)
                self.counts["inserted"] += 1
            else:
                place = min(range(32), key=lambda i: bucket[i].score)  # type: ignore[union-attr]
                lowest = bucket[place]
                assert lowest is not None
                if new.score < lowest.score and (scored or self.policy.name == "priority"):
                    self.counts["refused"] += 1
                    continue
                del self.where[lowest.key]
                self.counts["replaced"] += 1
            bucket[place] = new
            self.where[new.key] = number, place

    def erase(self, batch: list[Entry]) -> None:
        for new in _newest(batch):
            here = self.get(new.key)
            if here and here.stamp <= new.stamp:
                self._remove(here)
            self.counts["absent" if here is None else "erased" if here.stamp <= new.stamp else "kept"] += 1

    def evict(self, to_rows: int) -> None:
        entries = sorted((self.get(key) for key in self.where), key=lambda e: (e.score, hash_of(e.key)))  # type: ignore[union-attr]
        for entry in entries[: max(0, len(entries) - to_rows)]:
            assert entry is not None
            self._remove(entry)
            self.counts["evicted"] += 1

    def decay(self) -> None:
        for key in self.where:
            entry = self.get(key)
            assert entry is not None
            rank, tick = divmod(entry.score, 2**32)
            entry.score = rank // 2 * 2**32 + tick

    def rows(self, newer_than: int = 0) -> dict[int, tuple[int, int, bytes]]:
        """Key -> stamp, score, row."""
        entries = [entry for key in self.where if (entry := self.get(key)) and entry.stamp > newer_than]
        return {entry.key: (entry.stamp, entry.score, entry.row) for entry in entries}

    def decoded(self, entry: Entry) -> np.ndarray:
        data = np.frombuffer(entry.row, np.uint8)[None]
        return store_codec.decode(self.shape.codec, data, self.shape.dim)[0]

    def _assign(self, here: Entry | None, new: Entry) -> None:
        if here is None:
            return
        if new.stamp > here.stamp:
            here.stamp, here.row = new.stamp, new.row
            self.counts["assigned"] += 1
        else:
            self.counts["kept"] += 1

    def _use(self, entry: Entry, tick: int) -> None:
        if self.policy.name == "lfu":
            entry.score += 2**32
        else:
            entry.score = entry.score // 2**32 * 2**32 + max(entry.score % 2**32, tick)

    def _remove(self, entry: Entry) -> None:
        bucket, place = self.where.pop(entry.key)
        self.buckets[bucket][place] = None


def _newest(batch: list[Entry]) -> list[Entry]:
    """One of each key, in the order of hashes."""
    newest: dict[int, Entry] = {}
    for entry in batch:
        if entry.key not in newest or entry.stamp >= newest[entry.key].stamp:
            newest[entry.key] = entry
    return sorted(newest.values(), key=lambda entry: hash_of(entry.key))


def random_rows(rng: np.random.Generator, shape: Shape, count: int) -> np.ndarray:
    """uint8[count, row_bytes]: encoded rows, large values, small ones and zeros among them."""
    values = rng.standard_normal((count, shape.dim)) * 10.0 ** rng.integers(-7, 4, (count, shape.dim))
    values[rng.random(values.shape) < 0.1] = 0
    return store_codec.encode(shape.codec, values.astype(np.float32))


assert layout.BUCKET_SLOTS == 32
