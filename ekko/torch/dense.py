"""Dense parameters: which a model has, when they are due, and what of them is sent.

Pure but for the tensors that it copies, and for the clock where it is given no time. A *version* is a copy of all of them
between two steps, and goes in one batch with the rows of that moment, under its stamp. What goes of each tensor are those of
its rows, of 256 values, that are not as they were in the version before, so that a version costs what changed: of frozen
layers next to nothing. Two copies of the parameters are kept for it, in the memory of the host: the version before, and the
one on its way.

Now and then a version is sent whole (`WHOLE_EVERY`), and after whatever may have changed the node's: a rollback, a call that
failed after the node may have stored it, a node that lost its memory.
"""

import re
import time
from collections.abc import Iterable, Mapping
from typing import Final, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ekko.errors import ModelError

F32 = NDArray[np.float32]

# The so many-th version is whole, whatever changed.
WHOLE_EVERY: Final = 64
EVERY_S_MAX: Final = 86_400.0
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0}
# What becomes float32 without loss; readers get float32.
EXACT: Final = (torch.float32, torch.float16, torch.bfloat16)


class DenseStep(Protocol):
    """What is asked of a step; `ekko.train.step.Step` offers it."""

    def publish_dense(self, name: str, array: F32) -> None: ...


@runtime_checkable
class ChangesStep(Protocol):
    """What a step offers beyond that if its publisher can send what changed of a tensor."""

    def publish_dense_changes(self, name: str, array: F32, before: F32) -> int: ...


class Cadence:
    """How often a version is due.

    Args:
        every: a number of steps, or a time such as "500ms", "2s", "1m": at most so often, at the end of a step.
        now_s: monotonic seconds.

    Raises:
        ModelError: it is neither.
    """

    def __init__(self, every: int | str, now_s: float) -> None:
        self._steps = 0  # when it was last asked
        self._since = now_s
        self._every: int | None = None
        self._every_s = 0.0
        parts = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)", every) if isinstance(every, str) else None
        if parts is not None:
            self._every_s = float(parts[1]) * _UNITS[parts[2]]
        elif isinstance(every, int) and not isinstance(every, bool) and every >= 1:
            self._every = every
        if self._every is None and not 0 < self._every_s <= EVERY_S_MAX:
            raise ModelError(
                f'dense_every is {every!r}: expected a number of steps from 1, a time such as "2s" (ms, s, m, h; a day at '
                "most), or None for never"
            )

    def is_due(self, steps: int, now_s: float | None = None) -> bool:
        """Whether a version has become due since this was last asked, after so many steps; at a time, None: now."""
        before, self._steps = self._steps, steps
        if self._every is not None:
            return steps // self._every > before // self._every
        if steps == before:
            return False
        now_s = time.monotonic() if now_s is None else now_s
        if now_s - self._since < self._every_s:
            return False
        self._since = now_s
        return True


class DenseParameters:
    """The dense parameters of a model in training.

    All parameters that are not tables, TorchRec's included, and buffers that a state dict has (the means and variances of batch
    norm), under their names; float16 and bfloat16 go as float32, which holds them exactly. Whole numbers in buffers stay where
    they are: how many batches a norm has seen is of no use to who serves.

    Used by one thread at a time; `take` is called between two steps.

    Args:
        model: the model.
        tables: weights that are published as tables.
        every: see `Cadence`; None: only on demand.
        now_s: monotonic seconds.

    Raises:
        ModelError: `every` is no cadence; or there is one, and a parameter that cannot be published.
    """

    def __init__(self, model: nn.Module, tables: Iterable[Tensor], every: int | str | None, now_s: float) -> None:
        taken = {id(weight) for weight in tables}
        self._model = model
        self._parameters: dict[str, Tensor] = {
            name: value for name, value in model.named_parameters() if id(value) not in taken and not _is_shard(value)
        }
        kept = model.state_dict(keep_vars=True)
        buffers = (name for name, value in model.named_buffers() if name in kept and id(value) not in taken)
        self._buffers = tuple(name for name in buffers if _is_inexact(model.get_buffer(name)))
        self._cadence = None if every is None else Cadence(every, now_s)
        self.steps = 0  # that have ended: each counts itself, and what follows from that is found where somebody asks
        self._due = False
        self._steps_taken = -1  # when the last version was taken
        self._before: dict[str, F32] = {}
        self._versions = 0
        self._openings = 0
        if every is not None:
            self.check()

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which they are published."""
        return (*self._parameters, *self._buffers)

    @property
    def periodic(self) -> bool:
        """Whether versions become due by themselves."""
        return self._cadence is not None

    @property
    def due(self) -> bool:
        """Whether a version is to go with the next batch."""
        self._look()
        return self._due

    @property
    def unsent(self) -> bool:
        """Whether a step has ended since the last version was taken, so that nobody has what it changed."""
        return self.steps != self._steps_taken

    def _look(self) -> None:
        """Have a version due if one has become so up to the step that has ended last."""
        if self._cadence is not None and self._cadence.is_due(self.steps):
            self._due = bool(self.names)

    def check(self) -> None:
        """Refuse what cannot be published.

        Raises:
            ModelError: a parameter has another dtype.
        """
        for name in self.names:
            if (dtype := self.tensor(name).dtype) not in EXACT:
                raise ModelError(
                    f"parameter {name!r} has dtype {dtype}: only torch.float32 is available in this version, and "
                    "torch.float16 and torch.bfloat16, which it holds exactly"
                )

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as the model has it now."""
        value = self._parameters.get(name)
        return self._model.get_buffer(name) if value is None else value

    def demand(self) -> None:
        """A version is due now.

        Raises:
            ModelError: as `check`.
        """
        self.check()
        self._due = bool(self.names)

    def drop(self) -> None:
        """No version is due any more, and the next one is sent whole: the node's is not what was sent last."""
        self._look()
        self._due = False
        self._before.clear()

    def take(self) -> dict[str, F32]:
        """A version: float32 copies of all, by name. Nothing is due any more; hand it to `published`, or to `failed`."""
        version = {name: _copy(self.tensor(name)) for name in self.names}
        self._look()
        self._due, self._steps_taken = False, self.steps
        return version

    def failed(self) -> None:
        """The version that was taken is not with the node: one is due."""
        self._due, self._steps_taken = True, -1
        self._before.clear()  # it may be there nevertheless, so that nobody knows what the node has

    def add_to(self, step: DenseStep, version: Mapping[str, F32]) -> None:
        """Have a step publish a version: what changed since the last one that was published, or all of it."""
        # Asked once: whether an object has what a protocol says takes Python longer than a tensor takes.
        differs = step.publish_dense_changes if isinstance(step, ChangesStep) else None
        whole = self._versions % WHOLE_EVERY == 0
        for name, value in version.items():
            before = self._before.get(name)
            if whole or differs is None or before is None or before.shape != value.shape:
                step.publish_dense(name, value)
            else:
                differs(name, value, before)

    def published(self, version: dict[str, F32], openings: int = 0) -> None:
        """The node has stored a version.

        Args:
            version: what `take` gave.
            openings: how often the publisher has opened the model: once more, and the node had lost its memory before it stored
                this; then it is due again, and goes whole.
        """
        self._before = version
        self._versions += 1
        if openings != self._openings:
            if self._versions > 1:
                self.failed()
            self._openings = openings


def _is_shard(value: Tensor) -> bool:
    """Whether it is a table of TorchRec's, which `ekko.torch.torchrec` publishes; told by name, so that nobody need have it."""
    return type(value).__name__ == "TableBatchedEmbeddingSlice"


def _is_inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _copy(value: Tensor) -> F32:
    """float32, in memory of its own."""
    copied: F32 = value.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
    return copied
