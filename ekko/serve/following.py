"""A reader's side of following its node: which model look-ups are of now, what there is in it, and what is refused by name."""

import time
from collections.abc import Callable
from collections.abc import Mapping as ReadOnlyMapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.errors import ModelError
from ekko.model import DENSE_TABLE, TensorSpec, check_name
from ekko.serve.arguments import as_keys
from ekko.serve.attachment import Attacher, Attachment, names, not_for_us
from ekko.store import layout
from ekko.store.kernels.index import shards_of
from ekko.store.locks import ForkSafeLock
from ekko.store.view import TableView

U64 = NDArray[np.uint64]

# How often a waiting reader looks for its model, seconds.
POLL_S = 0.01
_SYNCED_UNTIL = layout.MODEL.offset("synced_until_ms") // 8


class Follower:
    """The model that a `Reader` reads, as the node has it now. Safe to use from any number of threads.

    Args:
        model, run_dir, wait, unheld, counted: as of `Reader`.
        check: called with each table that is mapped; what it raises ends the attaching.
    """

    def __init__(
        self,
        model: str,
        run_dir: str | Path,
        wait: float | None,
        unheld: Literal["raise", "absent"],
        check: Callable[[TableView], None],
        counted: bool,
    ) -> None:
        if unheld not in ("raise", "absent"):
            raise ModelError(f"unheld is {unheld!r}: expected 'raise' or 'absent'")
        self.model = check_name("model", model)
        self._counted = counted
        self._refuses_unheld = unheld == "raise"
        self._run_dir = Path(run_dir)
        self._wait_s = wait or 0.0
        self._attacher = Attacher(model, self._run_dir, counted, check)
        self._attaching = ForkSafeLock()
        self._closed = False
        self._attachment: Attachment | None = None
        self._current()

    @property
    def tables(self) -> ReadOnlyMapping[str, int]:
        """Name -> dim of the model's tables."""
        tables = self._current().tables
        return MappingProxyType({name: view.spec.dim for name, view in tables.items() if name != DENSE_TABLE})

    @property
    def generation(self) -> str:
        """The name of the model that look-ups read now: `model` itself, or what it stands for as an alias."""
        return self._current().model.name

    @property
    def counting(self) -> bool:
        """Whether look-ups are counted (`ekko hot`): not with `counted=False`, nor where this process may not
        write to the node's hot files.
        """
        return self._counted and all(view.counter.on for name, view in self._current().tables.items() if name != DENSE_TABLE)

    @property
    def partitions(self) -> int:
        """Into how many partitions the model is divided."""
        return self._current().partitions

    @property
    def hold(self) -> tuple[int, ...]:
        """The partitions that the node holds, ascending."""
        return self._current().hold

    def partition_of(self, keys: ArrayLike) -> NDArray[np.int64]:
        """int64[*keys.shape]: the partition of each key, for sending it to a node that holds it."""
        wanted = as_keys(keys)
        attachment = self._current()
        return partitions_of(wanted.reshape(-1), attachment.shards, attachment.partitions).reshape(wanted.shape)

    def staleness_ms(self) -> float | None:
        """Now minus the newest moment up to which this node has everything that every live writer wrote; None: unknown."""
        until = self._current().header[_SYNCED_UNTIL]
        return max(0.0, time.time() * 1000 - until) if until else None

    def _current(self) -> Attachment:
        attachment = self._attachment
        if attachment is not None and attachment.current:
            return attachment
        with self._attaching:
            deadline = time.monotonic() + self._wait_s
            while self._attachment is None or not self._attachment.current:
                if self._closed:
                    raise ModelError(f"the reader of model {self.model!r} is closed: make a new one")
                try:
                    self._attachment = self._attacher.attach(self._attachment)  # None lets go of memory that was dropped
                except PermissionError as error:
                    raise not_for_us(error, self._run_dir) from error
                if self._attachment is not None:
                    break
                if time.monotonic() >= deadline:
                    raise ModelError(self._attacher.missing())
                time.sleep(POLL_S)
            return self._attachment

    def _view(self, attachment: Attachment, name: str) -> TableView:
        view = attachment.tables.get(name)
        if view is None:
            known = [table for table in attachment.tables if table != DENSE_TABLE]
            what = f"has table {name!r} no more, which was dropped" if name in attachment.dropped else f"has no table {name!r}"
            raise ModelError(f"{self._named(attachment)} {what}: it has {names(dict.fromkeys(known))}")
        return view

    def _table(self, name: str) -> TableView:
        return self._view(self._current(), name)

    def _tensor(self, attachment: Attachment, name: str) -> TensorSpec:
        spec = attachment.tensors.get(name)
        if spec is None:
            raise ModelError(f"{self._named(attachment)} has no dense tensor {name!r}: it has {names(attachment.tensors)}")
        if len(attachment.hold) != attachment.partitions:
            self._check_held(attachment, spec.keys, f"rows of dense tensor {name!r}", "read it on a node that holds them")
        return spec

    def _named(self, attachment: Attachment) -> str:
        """The model in an error: by what was asked for, and by what that stands for."""
        name = attachment.model.name
        return f"model {name!r}" if name == self.model else f"model {name!r}, for which alias {self.model!r} stands,"

    def _check_keys(self, attachment: Attachment, table: str, keys: U64, padding_key: int | None) -> None:
        """Refuse keys of partitions that are not here, padding aside, unless they are to count as absent."""
        if len(attachment.hold) != attachment.partitions and self._refuses_unheld:
            asked = keys.reshape(-1)
            if padding_key is not None:
                asked = asked[asked != np.uint64(padding_key)]
            what, remedy = f"keys of table {table!r}", "ask a node that holds them (see Reader.partition_of)"
            self._check_held(attachment, asked, what, remedy)

    def _check_held(self, attachment: Attachment, keys: U64, what: str, remedy: str) -> None:
        """Refuse keys of partitions that are not here.

        Raises:
            ModelError: naming those partitions, and the ones that are here.
        """
        partitions = partitions_of(keys, attachment.shards, attachment.partitions)
        here = np.zeros(attachment.partitions, np.bool_)
        here[list(attachment.hold)] = True
        missing = np.unique(partitions[~here[partitions]]).tolist()
        if missing:
            raise ModelError(
                f"{what} are in partitions {missing} of model {self.model!r}, and the node at {self._run_dir} holds "
                f"{list(attachment.hold)} of {attachment.partitions}: {remedy}, or "
                f"add them to models.{self.model}.hold of this one"
            )


def partitions_of(keys: U64, shards: int, partitions: int) -> NDArray[np.int64]:
    """int64[n]: shard mod partitions of each key of uint64[n]."""
    out = np.empty(keys.size, np.int64)
    shards_of(np.ascontiguousarray(keys), shards, out)
    out %= partitions
    return out
