"""On a CUDA device: the same rows in a tensor of torch, whose places are known, against the cache, which finds them by key."""

import importlib
import time
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import alternate
from benchmarks.device.load import Bed, rows_of
from gpu.kernels import launchers


def compare(bed: Bed, index: int, moved: float) -> dict[str, float | str | None]:
    """How many times as fast as `torch.embedding` and `index_copy_`; and the bandwidth of a plain copy on this device.

    Args:
        bed: a filled cache of float32 rows on `cuda:index`.
        index: the device's number.
        moved: bytes a second that look-ups move.
    """
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        missing = ("lookup_vs_torch", "apply_vs_index_copy", "hbm_fraction")
        return dict.fromkeys(missing) | {f"note_{figure}": "this torch knows no CUDA" for figure in missing}
    place = torch.device("cuda", index)
    size, device, cache = bed.size, bed.device, bed.cache
    weight = torch.zeros((size.rows, size.dim), device=place)
    chosen = [bed.some(size.batch, seed) for seed in range(size.launches)]
    keys = [device.upload(bed.keys[indices]) for indices in chosen]
    places = [torch.from_numpy(indices).to(place) for indices in chosen]
    out, stamps = device.empty((size.batch, size.dim), np.float32), device.empty(size.batch, np.uint64)
    batches = _Updates(bed, torch, place)

    def lookups(_: int) -> None:
        for one in keys:
            cache.lookup(one, out, stamps)
        device.synchronize()

    def embedding(_: int) -> None:
        for one in places:
            torch.nn.functional.embedding(one, weight)
        torch.cuda.synchronize(place)

    sides = {
        "lookup": lookups,
        "embedding": embedding,
        "apply": lambda number: batches.apply(number),
        "index_copy": lambda _: batches.index_copy(weight),
    }
    measured = alternate(size.rounds, sides)
    copied = copy_bandwidth(torch, place)
    return {
        "lookup_vs_torch": measured.ratio("lookup", "embedding"),
        "apply_vs_index_copy": measured.ratio("apply", "index_copy"),
        "applies_on_device_per_s": size.launches * batches.count / measured.median("apply"),
        "copy_bytes_per_s": copied,
        "hbm_fraction": moved / copied,
    }


class _Updates:
    """The same rows on the device, for both sides; keys and places without repeats, in random order."""

    def __init__(self, bed: Bed, torch: Any, place: Any) -> None:
        self._bed, self._torch, self._place = bed, torch, place
        chosen = np.random.default_rng(3).permutation(bed.size.rows)[: bed.size.batch]
        self.count = len(chosen)
        rows = rows_of(chosen, bed.size.dim)
        device = bed.device
        self._keys, self._rows = device.upload(bed.keys[chosen]), device.upload(rows)
        self._outcomes = device.empty(self.count, np.uint8)
        self._stamps = [device.empty(self.count, np.uint64) for _ in range(bed.size.launches)]
        self._places = torch.from_numpy(chosen).to(place)
        self._values = torch.from_numpy(rows.view(np.float32)).to(place)

    def apply(self, _: int) -> None:
        bed = self._bed
        for stamps in self._stamps:  # each launch is newer than the last, so that each writes; 8 bytes a row are uploaded
            bed.device.upload(bed.stamps(self.count), stamps)
            launchers.apply(bed.device, bed.cache.memory, self._keys, stamps, self._rows, self._outcomes)
        bed.device.synchronize()

    def index_copy(self, weight: Any) -> None:
        for _ in self._stamps:
            weight.index_copy_(0, self._places, self._values)
        self._torch.cuda.synchronize(self._place)


def copy_bandwidth(torch: Any, place: Any, size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy of so many bytes: what a kernel may hope for."""
    source = torch.zeros(size, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        torch.cuda.synchronize(place)
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(place)
        times.append(time.perf_counter() - begin)
    return 2 * size / median(times[1:])
