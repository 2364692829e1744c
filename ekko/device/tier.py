"""Look-ups of a reader that has a device: first there, then in shared memory for what is missed, and all results on the device.

A look-up waits for its own stream, twice at most: to learn what it missed, and until those rows have come. Nothing else on the
device is waited for, and what is returned is there.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ekko.device.binding import Binding, Readable, check_device
from ekko.device.needed import Needed
from ekko.device.warming import warm_reader
from ekko.errors import ModelError, StoreError
from ekko.store import layout
from ekko.store.kernels import pool
from ekko.store.kernels.atomics import watch_word
from ekko.store.kernels.batches import unchanged
from ekko.store.view import NO_WEIGHTS, ZEROS, Bags, TableView
from gpu.backend import Array, Device, Stream, open_device
from gpu.batches import check_array
from gpu.errors import ArgumentError, DeviceError
from gpu.kernels import launchers
from gpu.reading import lookup_pooled

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

# A row in shared memory that stays locked for so long is given its table's default: its writer is dead, or stopped in mid-row.
WAIT_S: Final = 0.1
_EPOCH: Final = layout.MODEL.offset("batch_epoch")


@dataclass(slots=True)
class TierCounts:
    """What became of the keys that one reader looked up. Threads that count at once may lose a few."""

    hits: int = 0  # were on the device
    misses: int = 0  # were not, and were read in shared memory
    behind: int = 0  # were on the device, maybe in an older version than this reader had seen, and were read in shared memory
    host_only: int = 0  # were read in shared memory, since there was no cache to look into
    defaulted: int = 0  # have the default, since their row stayed locked

    def to_json(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ask:
    """Of which table rows are wanted."""

    header: int  # address of its model's header
    view: TableView
    default: F32 | None  # float32[dim], what absent keys are; None: zeros


class _Mine(threading.local):
    """What each thread has of its own."""

    stream: Stream | None = None
    rows: F32 | None = None  # pinned


class DeviceTier:
    """Of one reader. Threads may share it; a process that was forked may not go on with its parent's.

    Args:
        name: of the device.
        run_dir: the node's.
        wait_s: for the node to have one.
        asks: rows that it misses are to come to the device.

    Raises:
        ModelError: there is no such device in this process.
        StoreError: the node keeps no rows there.
    """

    def __init__(self, name: str, run_dir: Path, wait_s: float, *, asks: bool = True) -> None:
        try:
            self.device: Device = open_device(name)
            check_device(run_dir, name, wait_s)
            warm_reader(self.device)
        except DeviceError as error:
            raise ModelError(f"device {name!r} cannot be used here: {error}") from None
        self._asks = asks
        self.counts = TierCounts()
        self._binding = Binding(self.device, run_dir)
        self._needed: dict[tuple[str, int], Needed] = {}  # by store and model
        self._mine = _Mine()
        self._pid = os.getpid()

    @property
    def reason(self) -> str:
        """Why rows are read in shared memory only, as of the last look-up; empty: they are not."""
        return self._binding.reason

    def serves(self, view: TableView) -> bool:
        """Whether look-ups of a table are answered on the device now."""
        return self._binding.cache_of(view) is not None

    def host_keys(self, keys: Any) -> Any:
        """Keys as the host has them: what torch or CuPy have on a device is copied, behind what they are doing there."""
        if not hasattr(keys, "__cuda_array_interface__"):
            return keys
        return keys.cpu().numpy() if hasattr(keys, "cpu") else keys.get()

    def upload(self, values: NDArray[Any], out: Array | None = None) -> Array:
        """A copy on the device."""
        stream = self._stream()
        copied = self.device.upload(values, out, stream=stream)
        stream.synchronize()
        return copied

    # --- rows

    def lookup(self, ask: Ask, keys: U64, out: Array | None = None, *, stamps: bool = False) -> tuple[Array, U64 | None]:
        """Rows by key.

        Args:
            ask: of which table.
            keys: uint64 of any shape, of the host.
            out: float32[*keys.shape, dim] on the device; None: a new array.
            stamps: of the rows, too.

        Returns:
            float32[*keys.shape, dim] on the device; uint64 of the host, of the keys' shape, 0 for absent keys, or None.

        Raises:
            ModelError: an `out` that does not fit.
            StoreError: the device failed, or has no room for the result.
        """
        shape, asked = (*keys.shape, ask.view.spec.dim), keys.reshape(-1)
        _check_out(out, shape)
        with self._errors():
            found, found_stamps = self._lookup(ask, asked, None if out is None else out.reshape(asked.size, shape[-1]), stamps)
        return found.reshape(shape) if out is None else out, None if found_stamps is None else found_stamps.reshape(keys.shape)

    def _lookup(self, ask: Ask, keys: U64, out: Array | None, stamps: bool) -> tuple[Array, U64 | None]:
        ask.view.count(keys)
        bound, stream = self._binding.cache_of(ask.view), self._stream()
        if bound is None or not keys.size:
            rows, found_stamps = self._from_host(ask, keys)
            self.counts.host_only += keys.size
            shown = self.device.upload(rows, out, stream=stream)
            stream.synchronize()
            return shown, found_stamps if stamps else None
        found = bound.cache.lookup(self.device.upload(keys, stream=stream), out=out, stream=stream)
        places = self._wanting(ask, keys, found.missed_indices(stream), bound.applied)
        if places.size:
            rows, found_stamps = self._from_host(ask, keys[places])
            self._post(bound, keys[places[found_stamps != 0]])
            self._put(rows, found_stamps, places, found.rows, found.stamps, stream)
        all_stamps = self.device.download(found.stamps, stream=stream) if stamps else None
        stream.synchronize()
        return found.rows, all_stamps

    def _wanting(self, ask: Ask, keys: U64, missed: I64, applied: int) -> I64:
        """int64[m], rising: which keys are to be read in shared memory: missed ones, and those that this reader may have seen
        in a newer version than the device has.
        """
        self.counts.misses += missed.size
        places = missed
        if (behind := self._needed_of(ask).behind(keys, applied)) is not None:
            behind[missed] = False
            self.counts.behind += int(np.count_nonzero(behind))
            behind[missed] = True
            places = np.flatnonzero(behind)
        self.counts.hits += keys.size - places.size
        return places

    def _from_host(self, ask: Ask, keys: U64) -> tuple[F32, U64]:
        """Rows from shared memory, in pinned memory that this thread's next call uses again; and their stamps."""
        rows, stamps = self._pinned(keys.size, ask.view.spec.dim), np.empty(keys.size, np.uint64)
        self.counts.defaulted += ask.view.read(np.ascontiguousarray(keys), rows, stamps, ask.default, WAIT_S)
        self._need(ask, keys)
        return rows, stamps

    def _need(self, ask: Ask, keys: U64) -> None:
        """These keys were read in shared memory by now: the device is not to show an older version of them."""
        address = ask.header + _EPOCH
        epoch = watch_word(address)
        while not unchanged(address, epoch):  # behind a fence: it is not older than the rows
            epoch = watch_word(address)
        self._needed_of(ask).note(keys, epoch)

    def _needed_of(self, ask: Ask) -> Needed:
        files = ask.view.files
        return self._needed.setdefault((files.memory.prefix, files.model_id), Needed())

    def _post(self, bound: Readable, keys: U64) -> None:
        """Ask for rows that were not on the device."""
        if self._asks and bound.post is not None and keys.size:
            bound.post.post(np.ascontiguousarray(keys))

    def _put(self, rows: F32, stamps: U64, places: I64, out: Array, out_stamps: Array, stream: Stream) -> None:
        """Put rows and stamps of the host where a look-up left others."""
        device = self.device
        on_device = [device.upload(column, stream=stream) for column in (rows, stamps, places)]
        launchers.scatter(device, on_device[0], on_device[1], on_device[2], out, out_stamps, stream=stream)

    # --- pooled

    def pool(self, ask: Ask, keys: U64, bags: Bags, out: Array | None = None) -> Array:
        """One row a bag, float32[bags, dim] on the device, of keys uint64[n] of the host; else as `lookup`.

        A bag with a key that is not on the device is made of rows in shared memory, all of it: it is then, to the bit, what a
        reader without a device gets.

        Raises:
            ModelError: an `out` that does not fit.
            StoreError: see `TableView.pool`; or as `lookup`.
        """
        _check_out(out, (bags.ends.size - 1, ask.view.spec.dim))
        with self._errors():
            return self._pool(ask, keys, bags, out)

    def _pool(self, ask: Ask, keys: U64, bags: Bags, out: Array | None) -> Array:
        ask.view.count(keys, bags.padding)
        bound, stream, device = self._binding.cache_of(ask.view), self._stream(), self.device
        if bound is None or bags.mode == pool.MAX or not keys.size:  # the kernels know no maximum
            self.counts.host_only += keys.size
            shown = device.upload(self._pool_on_host(ask, keys, bags), out, stream=stream)
            stream.synchronize()
            return shown
        keys, bags = without_padding(keys, bags)
        weights = device.upload(bags.weights, stream=stream) if bags.mode == pool.WEIGHTED_SUM else None
        request = bound.cache, device.upload(keys, stream=stream), device.upload(bags.ends, stream=stream), weights
        mode = "mean" if bags.mode == pool.MEAN else "sum"
        (found,) = lookup_pooled([request], mode, None if out is None else [out], stream)
        places = self._wanting(ask, keys, found.missed_indices(stream), bound.applied)
        if places.size:
            chosen = np.unique(np.searchsorted(bags.ends, places, "right") - 1)
            self._post(bound, keys[places])
            rows = self._pool_on_host(ask, *bags_of(keys, bags, chosen))
            none = np.zeros(bags.ends.size - 1, np.uint64)  # a bag has no stamp
            self._put(rows, none[: chosen.size], chosen, found.rows, device.upload(none, stream=stream), stream)
        stream.synchronize()
        return found.rows

    def _pool_on_host(self, ask: Ask, keys: U64, bags: Bags) -> F32:
        rows = self._pinned(bags.ends.size - 1, ask.view.spec.dim)
        ask.view.pool(keys, bags, rows, address_of(ask.default), counted=False)
        self._need(ask, keys)
        return rows

    # --- of each thread

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Within it, what the device says is an error of ours."""
        try:
            yield
        except DeviceError as error:
            raise StoreError(f"device {self.device.name!r}: {error}") from error

    def _stream(self) -> Stream:
        if os.getpid() != self._pid:
            raise ModelError("a reader with a device was forked, and devices do not go along: make a new one in this process")
        if self._mine.stream is None:
            self._mine.stream = self.device.stream()
        return self._mine.stream

    def _pinned(self, count: int, dim: int) -> F32:
        held = self._mine.rows
        if held is None or held.size < count * dim:
            held = self._mine.rows = self.device.pinned(1 << (count * dim - 1).bit_length() if count else 1, np.float32)
        rows: F32 = held[: count * dim].reshape(count, dim)
        return rows


def without_padding(keys: U64, bags: Bags) -> tuple[U64, Bags]:
    """The same bags without the key that is left out of each."""
    if bags.padding is None or not (padded := keys == np.uint64(bags.padding)).any():
        return keys, replace(bags, padding=None)
    before = np.concatenate(([0], np.cumsum(padded)))
    weights = bags.weights[~padded] if bags.weights.size else bags.weights
    return keys[~padded], Bags(bags.ends - before[bags.ends], bags.mode, weights, None)


def bags_of(keys: U64, bags: Bags, chosen: I64) -> tuple[U64, Bags]:
    """Some of the bags, with their keys."""
    begins, sizes = bags.ends[chosen], bags.ends[chosen + 1] - bags.ends[chosen]
    ends = np.concatenate(([0], np.cumsum(sizes)))
    places = np.arange(ends[-1]) + np.repeat(begins - ends[:-1], sizes)
    weights = bags.weights[places] if bags.weights.size else NO_WEIGHTS
    return keys[places], Bags(ends, bags.mode, weights, bags.padding)


def _check_out(out: Array | None, shape: tuple[int, ...]) -> None:
    if out is not None:
        try:
            check_array("out", out, (np.float32,), shape)
        except ArgumentError as error:
            raise ModelError(str(error)) from None


def address_of(row: F32 | None) -> int:
    """Of a default row, as the kernels take it; the caller keeps it alive."""
    return ZEROS if row is None else int(row.__array_interface__["data"][0])
