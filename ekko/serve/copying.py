"""How rows get into arrays: from mapped memory, or from a device in front of it, once what a user passed is checked."""

from collections.abc import Callable
from collections.abc import Mapping as ReadOnlyMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ekko.serve.arguments import as_keys, output
from ekko.serve.attachment import Attachment
from ekko.serve.consistency import between_batches
from ekko.serve.defaults import Defaults
from ekko.serve.following import Follower
from ekko.store.view import Bags, TableView

if TYPE_CHECKING:
    from ekko.device.tier import Ask, DeviceTier

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]


class Copier(Follower):
    """What all look-ups of a `Reader` have in common."""

    def __init__(
        self,
        model: str,
        run_dir: str | Path,
        wait: float | None,
        unheld: Literal["raise", "absent"],
        defaults: Defaults,
        counted: bool,
        device: str | None,
    ) -> None:
        super().__init__(model, run_dir, wait, unheld, defaults.check, counted)
        self._defaults = defaults
        self._tier: DeviceTier | None = None
        if device is not None:
            self._tier = _tier_of(device, self._run_dir, self._wait_s, counted)

    @property
    def device(self) -> "DeviceTier | None":
        """What this reader does with its device: `device.counts`, and `device.reason` why rows come from the host; None: no
        device was asked for.
        """
        return self._tier

    def _ask(self, attachment: Attachment, view: TableView) -> "Ask":
        from ekko.device.tier import Ask

        return Ask(attachment.header_address, view, self._defaults.row(view).values)

    def _lookup_on(
        self,
        tier: "DeviceTier",
        attachment: Attachment,
        view: TableView,
        keys: ArrayLike,
        out: Any,
        stamps: bool,
        consistent: bool,
    ) -> Any:
        """`lookup` of a reader that has a device."""
        wanted = as_keys(tier.host_keys(keys))
        self._check_keys(attachment, view.spec.name, wanted, None)
        if not consistent:
            rows, found = tier.lookup(self._ask(attachment, view), wanted, out, stamps=stamps)
        else:  # the device does not say where its batches end
            copied, found = np.empty((*wanted.shape, view.spec.dim), np.float32), np.empty(wanted.shape, np.uint64)
            self._read(attachment, consistent, lambda: self._copy(view, wanted, copied, found))
            rows = tier.upload(copied, out)
        return (rows, found) if stamps else rows

    def _calls(
        self, attachment: Attachment, keys: ReadOnlyMapping[str, ArrayLike], out: ReadOnlyMapping[str, F32]
    ) -> list[tuple[TableView, U64, F32]]:
        """What look-ups of several tables are to read, and where to, all of it checked."""
        calls = []
        for table, asked in keys.items():
            view, wanted = self._view(attachment, table), as_keys(asked)
            self._check_keys(attachment, table, wanted, None)
            calls.append((view, wanted, output(out.get(table), (*wanted.shape, view.spec.dim))))
        return calls

    def _read(self, attachment: Attachment, consistent: bool, gather: Callable[[], None]) -> None:
        if consistent:
            between_batches(self.model, attachment.header_address, gather)
        else:
            gather()

    def _copy(self, view: TableView, keys: U64, rows: F32, stamps: U64) -> None:
        default = self._defaults.row(view)  # it is kept alive through the call
        if keys.ndim == 1:
            view.lookup(keys, rows, stamps, default.address)
        else:
            view.lookup(keys.reshape(-1), rows.reshape(-1, view.spec.dim), stamps.reshape(-1), default.address)

    def _pool(self, view: TableView, keys: U64, bags: Bags, rows: F32) -> None:
        default = self._defaults.row(view)  # it is kept alive through the call
        view.pool(keys.reshape(-1), bags, rows, default.address)

    def _host_keys(self, keys: ArrayLike) -> ArrayLike:
        """Keys that may be in an array of this reader's device."""
        return keys if self._tier is None else self._tier.host_keys(keys)

    def _shown(self, rows: F32) -> F32:
        """Rows of the host where this reader's are."""
        return rows if self._tier is None else self._tier.upload(rows)


def _tier_of(device: str, run_dir: Path, wait_s: float, counted: bool) -> "DeviceTier":
    from ekko.device.tier import DeviceTier  # readers without a device need none of it

    return DeviceTier(device, run_dir, wait_s, asks=counted)
