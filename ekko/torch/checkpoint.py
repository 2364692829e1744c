"""Going on from a checkpoint: what the dead run published after it does not stay, and cannot win (R24).

    checkpoint = ekko.torch.checkpoint_hook(tracker, optimizer)

From then on `optimizer.state_dict()` also has the last stamp that was published, and after `optimizer.load_state_dict()` the
next `optimizer.step()` (or `checkpoint.resume()`, to have it sooner) first does this:

1. The node is told to publish above the checkpoint's stamp and above all that any region holds (`Publisher.publish_above`): the
   dead run's node may have had a clock that was ahead, and its rows may be where this node has not looked yet. A region that
   does not answer is an error that names it; `unreachable="accept"` goes on without.
2. What rollbacks restored since the checkpoint was made is loaded into the model. It is newer than the checkpoint, and would
   otherwise be taken for the dead run's.
3. Rows that were published after the checkpoint and are not what the restored model has are published again from it.
   Nobody has a list of them: the stamps in the node's own memory say which rows those are.

Where several ranks train, all of them do this together. The stamp in the checkpoint is then that of the rank that saved it, and
the others' nodes have other clocks, so rows of any stamp that are not what the model has are published.

Rows that the dead run deleted, and those that only a region has which did not answer, stay as they are until a step touches
them.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from ekko.ceilings import Above
from ekko.codec import rounded
from ekko.errors import EkkoError, ModelError, NodeUnreachable, PublishError
from ekko.torch.ranks import WHOLE, Part, PartPublisher, broadcast, gathered
from ekko.torch.reloading import Reloaded
from ekko.torch.tracker import Tracker

# Under this name in the optimizer's state dict; torch keeps what it does not know of one, and does not look at it.
ENTRY: Final = "ekko"
FORMAT: Final = 1
FLUSH_S: Final = 10.0
RETRY_S: Final = 0.2
# For rows that are published again at a node that has to get a writer id first.
PUBLISH_S_MAX: Final = 60.0

Unreachable = Literal["raise", "accept"]
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint says of publishing."""

    model: str = ""
    stamp: int = 0  # all up to it is in the checkpoint's model; 0: not known
    epoch: int = 0  # of the last rollback that its model has in it
    ranks: int = 1

    def to_state(self) -> dict[str, int | str]:
        """For a state dict: nothing that `torch.load(weights_only=True)` would not load."""
        return {"format": FORMAT, "model": self.model, "stamp": self.stamp, "epoch": self.epoch, "ranks": self.ranks}

    @classmethod
    def of_state(cls, state: object) -> "Saved":
        """From a state dict; of one that was saved without the hook nothing is known.

        Raises:
            ModelError: it is of a later version, or is not from here.
        """
        if state is None:
            return cls()
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise ModelError(
                f"the checkpoint's entry {ENTRY!r} is not of format {FORMAT}: it is of another version of ekko; delete it from "
                "the optimizer's state dict to begin with all rows that differ"
            )
        numbers = [state.get(name) for name in ("stamp", "epoch", "ranks")]
        if not all(isinstance(number, int) and 0 <= number < 1 << 64 for number in numbers) or not numbers[2]:
            raise ModelError(f"the checkpoint's entry {ENTRY!r} is damaged: {dict(state)!r}"[:300])
        return cls(str(state.get("model")), state["stamp"], state["epoch"], state["ranks"])


@dataclass(frozen=True, slots=True)
class Resumed:
    """What `Checkpoint.resume` did."""

    above: Above | None  # what regions told; None: nothing was to be done
    reloaded: Reloaded = field(default_factory=lambda: Reloaded({}))
    rows: Mapping[str, int] = field(default_factory=dict)  # by table: published again by this rank
    stamp: int = 0  # of the last step of it; 0: none


class Checkpoint:
    """Made by `checkpoint_hook`; used by the thread that trains."""

    def __init__(self, tracker: Tracker, optimizer: Optimizer, unreachable: Unreachable, timeout: float) -> None:
        self._tracker = tracker
        self._publisher: Any = tracker.publisher
        self._unreachable = unreachable
        self._timeout = timeout
        self._loaded: Saved | None = None  # a checkpoint that was loaded, and not gone on from yet
        self._begun = False
        self._base = 0  # a stamp below which all is as the model has it, where this run has published nothing yet
        self._hooks = (
            optimizer.register_state_dict_post_hook(self._on_save),
            optimizer.register_load_state_dict_pre_hook(self._on_load),
        )
        tracker.before_step = self._before_step

    @property
    def _part(self) -> Part:
        return self._publisher.part if isinstance(self._publisher, PartPublisher) else WHOLE

    def _on_save(self, _: Optimizer, state: dict[str, Any]) -> None:
        saved = Saved(self._publisher.model, self._flushed(), self._publisher.epoch, self._part.ranks)
        state[ENTRY] = saved.to_state()

    def _flushed(self) -> int:
        """The stamp below which nothing of the model as it is now is missing; 0 where the node does not take it."""
        try:
            return self._tracker.flush(FLUSH_S) or self._base
        except (EkkoError, TimeoutError) as error:
            log.warning("a checkpoint without a stamp, since not all is published: %s", error)
            return 0

    def _on_load(self, _: Optimizer, state: dict[str, Any]) -> None:
        self._loaded = Saved.of_state(state.get(ENTRY))

    def _before_step(self) -> None:
        if self._loaded is not None or (not self._begun and self._part.ranks > 1):
            self.resume()

    def resume(self) -> Resumed:
        """Do what is to be done after a checkpoint was loaded, into the model, too; nothing where none was.

        With several ranks all of them call it at one place, after the same `load_state_dict`.

        Raises:
            ModelError: a region did not answer in time, and that is not accepted; nothing was published, and the next call, or
                step, tries again.
            NodeUnreachable: the local node does not answer.
        """
        saved = self._agreed()
        if saved is None:
            self._begun = True
            return Resumed(None)
        above = self._publisher.publish_above(saved.stamp if saved.model == self._publisher.model else 0, self._timeout)
        self._check_heard(above)
        reloaded = self._reload(saved)
        rows, stamp = self._publish_all_again(saved)
        self._loaded, self._begun, self._base = None, True, above.stamp
        return Resumed(above, reloaded, rows, stamp)

    def _agreed(self) -> Saved | None:
        """The checkpoint that was loaded; of several ranks' the oldest."""
        own = self._loaded or Saved()
        told = gathered(self._part, [int(self._loaded is not None), own.stamp, own.epoch, own.ranks])
        loaded = told[told[:, 0] == 1]
        if not len(loaded):
            return None
        if len(loaded) < len(told):
            raise ModelError(
                f"{len(loaded)} of {len(told)} ranks have loaded a checkpoint: call optimizer.load_state_dict() on all of them"
            )
        return Saved(
            own.model, int(loaded[:, 1].min()), int(loaded[:, 2].min()), max(int(loaded[:, 3].max()), self._part.ranks)
        )

    def _check_heard(self, above: Above) -> None:
        if not above.unheard:
            if above.silent:
                log.warning("went on from a checkpoint without having heard %s", ", ".join(above.silent))
            return
        told = (
            f"no node answers in {', '.join(above.unheard)} ({', '.join(above.silent)}): rows that the run before published "
            "after its checkpoint may be there, and may win over what is trained now"
        )
        if self._unreachable == "raise":
            raise ModelError(f'{told}; start those nodes, expel them, or pass unreachable="accept" to checkpoint_hook')
        log.warning("%s", told)

    def _reload(self, saved: Saved) -> Reloaded:
        """Load what was restored since the checkpoint was made, the same on all ranks."""
        if saved.model == self._publisher.model:
            self._publisher.look_back(saved.epoch)
        if isinstance(self._publisher, PartPublisher):
            self._publisher.share_restored()
        reloaded = self._tracker.reload()
        for name in reloaded.dense:
            broadcast(self._part, self._tracker.dense_tensor(name).detach())
        return reloaded

    def _publish_all_again(self, saved: Saved) -> tuple[dict[str, int], int]:
        """Rows by table, and the last stamp. A node that has never published waits for a writer id, which takes some seconds
        if those are gone that could have given it one; what was published by then is not stale any more.
        """
        deadline = time.monotonic() + PUBLISH_S_MAX
        rows: dict[str, int] = {}

        def stale(table: str, keys: U64, ours: F32) -> NDArray[np.bool_]:
            chosen = self._stale(table, keys, ours, saved)
            rows[table] = rows.get(table, 0) + int(np.count_nonzero(chosen))
            return chosen

        while True:
            try:
                return rows, self._tracker.publish_chosen(stale)
            except (NodeUnreachable, PublishError) as error:
                if time.monotonic() > deadline:
                    raise
                log.info("publishing after a checkpoint is tried again: %s", error)
                time.sleep(RETRY_S)

    def _stale(self, table: str, keys: U64, rows: F32, saved: Saved) -> NDArray[np.bool_]:
        """bool[n]: rows of this rank that the node has, of after the checkpoint, and not as the model has them."""
        reader = self._tracker.reader
        assert reader is not None
        chosen = self._part.mine(keys)
        held, stamps = reader.lookup(table, keys[chosen], stamps=True)
        ours = rounded(self._publisher.codec, rows[chosen])
        differs = (ours.view(np.uint32) != np.ascontiguousarray(held).view(np.uint32)).any(axis=1)
        same_model = saved.model == self._publisher.model
        after = np.uint64(saved.stamp if saved.ranks == 1 and same_model else 0)
        chosen[chosen] = differs & (stamps > after)
        return chosen

    def remove(self) -> None:
        """Stop: state dicts are as they were before, and nothing happens after loading one."""
        for hook in self._hooks:
            hook.remove()
        self._tracker.before_step = None


def checkpoint_hook(
    tracker: Tracker, optimizer: Optimizer, *, unreachable: Unreachable = "raise", timeout: float = 30.0
) -> Checkpoint:
    """Have `optimizer.state_dict()` keep the last stamp, and go on rightly from a checkpoint that has it.

    Saving waits until what is due is published, ten seconds at most; a node that is away is no reason not to save (a warning,
    and more is compared afterwards). A checkpoint that was saved without the hook may be loaded, too: then all rows that differ
    are published again. Load the model's own state before the next step, as usual. With several ranks call this on each, and
    load the same checkpoint on each.

    Args:
        tracker: as `track` gave it, with a `reader`.
        optimizer: whose state dict is part of the checkpoint; with several any one of them.
        unreachable: "raise": going on is refused while no node of some region answers, since what the run before published
            after the checkpoint may be there with a newer stamp; "accept": it is logged.
        timeout: seconds that regions get to answer.

    Returns:
        The handle.

    Raises:
        ModelError: the tracker has no reader, or an argument is none of these.
    """
    if unreachable not in get_args(Unreachable) or not timeout > 0:
        raise ModelError(f"unreachable is {unreachable!r} and timeout {timeout!r}: expected 'raise' or 'accept', and seconds")
    if tracker.reader is None:
        raise ModelError(
            "the tracker has no reader, which tells what the run before has published after a checkpoint: "
            "ekko.torch.track(..., reader=ekko.Reader(MODEL, run_dir=..., counted=False))"
        )
    return Checkpoint(tracker, optimizer, unreachable, float(timeout))
