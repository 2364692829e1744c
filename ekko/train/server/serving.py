"""From the rows that are trained to those that are served: the served model has their weights, in its own codec.

What a group changed is published once the training rows are safe, so that what is served is not lost; a comparison may serve a
row a moment before it is. Groups that are applied while this is under way are one step of the served model, with the newest row
of each key. After a start, or when another server's partitions come to us, what may have been left out is found by comparing
all rows (`reconcile`).
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

import ekko
from ekko.codec import LIMIT_BITS, rounded
from ekko.errors import ModelError, PublishError, StoreError
from ekko.local import PairStored
from ekko.store import layout
from ekko.store.images import StoreImage
from ekko.store.kernels.checks import all_below
from ekko.train.server import kernels
from ekko.train.server.arithmetic import WEIGHT_MAX
from ekko.train.server.rows import ATTACH_S, PUBLISH_S, Changed, Prepared, TrainingRows
from ekko.train.step import Step as PublishedStep

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

COMPARED_BYTES: int = 4 << 20  # rows that are compared at once, before pushes have their turn
PAIR_S: Final = 0.5  # for all holders to have a step, before the server waits for them by itself
PAUSE_S = 0.01  # between two of these

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class ServeCounts:
    """What happened to served rows so far."""

    served: int = 0
    reconciled: int = 0  # of those, what was found lacking at a start or a take-over
    out_of_range: int = 0  # rows that the served model's codec has no number for: what is served stays as it is


class ServedRows:
    """The served model of one trained model. Safe for threads; one publishes at a time.

    Args:
        rows: what is trained.
        run_dir: of the node beside.
        local: the node's local endpoint.
    """

    def __init__(self, rows: TrainingRows, run_dir: Path, local: str) -> None:
        self.counts = ServeCounts()
        self._rows = rows
        self._run_dir = run_dir
        self._publisher = ekko.Publisher(local, rows.model.name, timeout=PUBLISH_S)
        self._reader = ekko.Reader(rows.model.name, run_dir, wait=ATTACH_S, counted=False)
        self._due: list[Mapping[str, Changed]] = []  # of groups that are safe, oldest first; as many as `Serve` waits for
        self._adding = threading.Lock()
        self._publishing = threading.Lock()
        self.rolled_back = False  # the served model was, and what was due then was left out

    def close(self) -> None:
        """Let go of the node."""
        self._publisher.close()
        self._reader.close()

    def add(self, changed: Mapping[str, Changed]) -> None:
        """What a group changed; it is due."""
        with self._adding:
            self._due.append(changed)

    def publish(self) -> None:
        """Publish all that is due.

        Raises:
            EkkoError: the node did not take it; it is due still.
        """
        with self._publishing:
            with self._adding:
                taken = list(self._due)
            if taken:
                try:
                    self._publish(_merged(taken))
                except (ModelError, PublishError):
                    epoch = self._publisher.epoch
                    self._publisher.restored()  # maybe nothing, where all was written again since, or deleted for good
                    if self._publisher.epoch == epoch:
                        raise
                    # What is due was worked out from rows that were taken back.
                    log.warning("server_left_out_what_was_rolled_back", model=self._rows.model.name)
                    self.rolled_back = True
            with self._adding:
                del self._due[: len(taken)]

    def publish_pair(self, prepared: Prepared) -> PairStored | None:
        """Publish what a group has changed, and what is to be served of it as soon as that is everywhere, in one request.

        Returns:
            How far it came; None: nothing was published, since something older is due, or the node refused it.

        Raises:
            NodeUnreachable: as `Publisher.publish_pair`.
        """
        with self._publishing:  # what is compared meanwhile would be served after this, and be older
            if self._due:
                return None
            step, count = self._step_of(prepared.changed)
            then = self._publisher.request_of(step, time.monotonic_ns())
            stored = self._rows.publisher.publish_pair(self._rows.step_of(prepared), then, PAIR_S)
            if stored is not None and stored.second is not None:
                self.counts.served += count
            return stored

    def _publish(self, changed: Mapping[str, Changed]) -> int:
        step, count = self._step_of(changed)
        with step:
            pass
        self.counts.served += count
        return count

    def _step_of(self, changed: Mapping[str, Changed]) -> tuple[PublishedStep, int]:
        """What is published of these rows, and how many they are."""
        step, count = PublishedStep(self._publisher, copy=False), 0
        for table, one in changed.items():
            fits = self._fitting(one)
            step.publish_checked(table, fits.keys, fits.rows, fits.significance)
            count += len(fits.keys)
        return step, count

    def _fitting(self, changed: Changed) -> Changed:
        """Without rows that the codec has no number for."""
        codec = self._publisher.codec
        if codec == "float32" or all_below(changed.rows, LIMIT_BITS[codec]):
            return changed
        limit = np.uint32(LIMIT_BITS[codec]).view(np.float32)
        good = (np.abs(changed.rows) < limit).all(axis=1)
        self.counts.out_of_range += int(np.count_nonzero(~good))
        return Changed(changed.keys[good], changed.rows[good], changed.significance[good])

    def taken_back(self) -> None:
        """Forget what is due: it was worked out from rows that a rollback has taken back since.

        What is trained now is to be compared next (`reconcile`).

        Raises:
            EkkoError: the node does not say what was taken back.
        """
        with self._publishing:
            self._publisher.restored()
            with self._adding:
                self._due.clear()

    # --- after a start

    def settle(self) -> None:
        """Return when nothing is being published that was begun before."""
        with self._publishing:
            pass

    def reconcile(self, wanted: Callable[[], frozenset[int]]) -> None:
        """Publish what is trained in our partitions and not served as it is trained.

        Args:
            wanted: those that are ours still; it ends when there are none. Asked for every few rows, since a row of a
                partition that was handed over is served by another server, and may be old here.

        Raises:
            EkkoError: a row cannot be read, or the node did not take a step.
        """
        training = self._rows.model.training
        image = StoreImage(self._run_dir)
        entry = next((one for one in image.manifest.models if one.name == training), None)
        if entry is None:
            raise StoreError(f"the node at {self._run_dir} has no model {training!r}")
        model = image.model(entry)
        for spec in entry.tables:
            if spec.name not in self._rows.model.tables:
                continue
            stride = layout.row_stride(spec.row_bytes)
            buffer = np.empty(max(stride, COMPARED_BYTES // stride * stride), np.uint8)
            for part in model.rows(spec, buffer):
                if not wanted():
                    return
                keys = part.reshape(-1, stride)[:, _KEY : _KEY + 8].copy().view(np.uint64).reshape(-1)
                self._reconcile(spec.name, np.unique(keys), wanted)
                time.sleep(PAUSE_S)

    def _reconcile(self, table: str, keys: U64, wanted: Callable[[], frozenset[int]]) -> None:
        with self._publishing:  # what is published meanwhile would be newer than what was read
            keys = np.ascontiguousarray(keys[np.isin(self._rows.model.partition_of(keys), list(wanted()))])
            rows, trained = self._rows.reader.lookup(table, keys, stamps=True)
            there = trained != 0
            keys, rows = np.ascontiguousarray(keys[there]), np.ascontiguousarray(rows[there])
            fits = self._fitting(Changed(keys, rows, np.ones(len(keys), np.float32)))
            served, stamps = self._reader.lookup(table, fits.keys, stamps=True)
            differ = (stamps == 0) | (served != rounded(self._publisher.codec, fits.rows)).any(axis=1)
            if differ.any():
                lacking = Changed(fits.keys[differ], fits.rows[differ], fits.significance[differ])
                self.counts.reconciled += self._publish({table: lacking})


_KEY = layout.ROW.offset("key")


def _merged(groups: list[Mapping[str, Changed]]) -> dict[str, Changed]:
    """The newest row of each key, and how far the groups moved it together."""
    if len(groups) == 1:
        return dict(groups[0])
    merged = {}
    for table in dict.fromkeys(table for group in groups for table in group):
        parts = [group[table] for group in groups if table in group]
        keys, places = kernels.find_places(np.concatenate([part.keys for part in parts]))
        rows = np.empty((len(keys), parts[0].rows.shape[1]), np.float32)
        total = np.zeros(len(keys), np.float32)
        end = 0
        for part in parts:  # oldest first: the newest row of a key stays
            begin, end = end, end + len(part.keys)
            kernels.put_rows(rows, part.rows, places[begin:end])
            kernels.add_at(places[begin:end], part.significance, total)
        merged[table] = Changed(keys, rows, np.minimum(total, WEIGHT_MAX, out=total))
    return merged
