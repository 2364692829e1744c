"""`torch.nn.EmbeddingBag` and `torch.nn.Embedding` whose rows live on parameter servers.

Forward pulls the rows of a batch, each key once, into one tensor that takes part in autograd; torch's own functions pool it, so
that pooling and its gradients are theirs. Backward leaves the gradient of these rows, summed by key, with the bag, and
`client.step()` pushes what the bags of a client have.

    client = ekko.train.Client(["tcp://10.0.0.7:7900"], model="ctr", worker=0)
    bag = ekko.torch.PSEmbeddingBag(client, "item", mode="sum")
    ...
    loss.backward(); optimizer.step(); client.step()

`prefetch` asks for the rows of a later batch while this one is computed.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Final, Literal, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from ekko.errors import ModelError
from ekko.store.kernels.distinct import distinct

__all__ = ["PSEmbeddingBag", "prefetched", "push_after", "scaled_step"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Mode = Literal["sum", "mean", "max"]
Batch = TypeVar("Batch")

ASYNC: Final = "async"  # the mode in which servers answer pulls at once, as `ekko.train.server.wire` has it

# Batches asked for and not used yet, of one bag; the oldest is forgotten for one more. Loops ask for one, or a few where steps
# are short.
AHEAD_MAX: Final = 4
# Gradients of one bag since the last step; beyond it they are summed by key. Sums are taken in the same order either way.
GRADIENTS_MAX: Final = 64
# How far up a step looks whether a GradScaler has called it: its own frames, and those of torch's hooks and wrappers between.
CALLERS_MAX: Final = 12


class Pulling(Protocol):
    """Rows under way; `ekko.train.Pull` is one."""

    def result(self) -> Mapping[str, F32]: ...

    @property
    def failed(self) -> bool: ...


class Gradients(Protocol):
    """What has gradients for a client's next step."""

    def take(self) -> Iterable[tuple[str, U64, F32]]: ...

    def finite(self, scale: float) -> bool: ...


class RowClient(Protocol):
    """What a bag asks of a client; `ekko.train.Client` offers it."""

    @property
    def tables(self) -> Mapping[str, int]: ...

    @property
    def mode(self) -> str: ...

    @property
    def clock(self) -> int: ...

    def pull_async(self, keys: Mapping[str, U64], *, ahead: int = 0) -> Pulling: ...

    def attach(self, source: Gradients) -> None: ...

    def step(self, *, scale: float = 1.0) -> int: ...

    def discard(self) -> None: ...

    def finite(self, scale: float = 1.0) -> bool: ...


class PSEmbeddingBag(nn.Module):
    """`torch.nn.EmbeddingBag` over rows of a table on parameter servers; with `mode=None`, `torch.nn.Embedding`.

    It has no parameters: the servers' optimizer changes the rows, by the gradients that `client.step()` pushes. A key that no
    push has touched is what the table's initializer says. In `no_grad` nothing is remembered for a push.

    Args:
        client: an `ekko.train.Client` of the model.
        table: the table's name.
        mode: how the rows of a bag become one; None: no bags, a row for each id.
        include_last_offset: as in `torch.nn.EmbeddingBag`.
        padding_idx: this id counts as a row of zeros, is left out of every bag, and is never pulled or pushed.
        embedding_dim: checked against the table, if given.

    Raises:
        ModelError: an argument that cannot be honoured.
    """

    def __init__(
        self,
        client: RowClient,
        table: str,
        mode: Mode | None = "mean",
        *,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("sum", "mean", "max", None):
            raise ModelError(f"mode is {mode!r}: expected 'sum', 'mean' or 'max', or None for a row of each id")
        if mode is None and include_last_offset:
            raise ModelError("include_last_offset is about bags, and mode is None: leave it out")
        if table not in client.tables:
            raise ModelError(f"unknown table {table!r}: the servers have {', '.join(map(repr, client.tables)) or 'none'}")
        dim = client.tables[table]
        if embedding_dim is not None and embedding_dim != dim:
            raise ModelError(f"embedding_dim is {embedding_dim}, and table {table!r} has dim {dim}")
        if padding_idx is not None and padding_idx < 0:
            raise ModelError(f"padding_idx is {padding_idx}: expected an id; the servers' tables have no end to count from")
        self.table = table
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_idx
        self.embedding_dim = dim
        self._client = client
        self._ahead: deque[_Ahead] = deque()
        self._gradients = _Gradients(table)
        client.attach(self._gradients)

    def forward(
        self,
        input: Tensor,  # noqa: A002 - as torch calls it
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Pull the rows of a batch, and pool those of each bag.

        Args:
            input: int64 or int32, as `torch.nn.EmbeddingBag` takes it, or of any shape with `mode=None`; the bits of a key from
                2^63 are those of a negative number.
            offsets: integers [bags], where each bag begins.
            per_sample_weights: float32 of the shape of `input`; mode "sum" only.

        Returns:
            float32[bags, dim], or float32[*input.shape, dim] with `mode=None`; on the device of `input`.

        Raises:
            ModelError: ids that are not whole numbers, or arguments that do not fit.
            EkkoError: as `ekko.train.Client.pull`.
        """
        rows, places, padding = _pulled(self, input)
        if self.mode is None:
            if offsets is not None or per_sample_weights is not None:
                raise ModelError("offsets and per_sample_weights are about bags, and mode is None: leave them out")
            return functional.embedding(places, rows)
        return functional.embedding_bag(
            places,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )

    def prefetch(self, input: Tensor, ahead: int = 1) -> None:  # noqa: A002
        """Ask for the rows of the next batch, which the servers answer as of after this batch's push where they are in step.

        The next `forward` with the same ids uses them, once. Where the servers do not wait for pushes (mode "async"), rows that
        are asked for early are older by as much. Where they do, a `forward` that comes after another number of steps than was
        said asks again: those rows are too old, or wait for a push that comes after it (one that was discarded, or gradients
        that are accumulated).

        Args:
            input: the ids that `forward` will be called with.
            ahead: how many steps are made before.
        """
        _ask({self: input}, ahead)

    def extra_repr(self) -> str:
        return f"{self.table!r}, mode={self.mode!r}"

    def _asked(self, keys: U64) -> "_Ahead":
        """The rows of these ids, under way: asked for early, or now."""
        clock, in_step = self._client.clock, self._client.mode != ASYNC
        oldest = clock if in_step else clock - AHEAD_MAX
        self._ahead = deque(ahead for ahead in self._ahead if ahead.clock >= oldest)  # others are of a loop that was left
        for ahead in self._ahead:
            # In step, rows as of a push that is not made yet would be waited for in vain: it comes after this batch.
            if np.array_equal(ahead.ids.keys, keys) and (ahead.clock == clock or not in_step):
                self._ahead.remove(ahead)
                if not ahead.pulling.failed:  # as all do that were under way when servers dropped this worker
                    return ahead
                break
        ids = _Ids(keys, self.padding_idx)
        return _Ahead(ids, self._client.pull_async({self.table: ids.wanted}), clock)

    def _expect(self, ahead: "_Ahead") -> None:
        """Rows of a later batch are under way."""
        if len(self._ahead) == AHEAD_MAX:
            self._ahead.popleft()
        self._ahead.append(ahead)


def prefetched(batches: Iterable[Batch], ids: Callable[[Batch], Mapping[PSEmbeddingBag, Tensor]]) -> Iterator[Batch]:
    """Each batch, while the rows of the one after it are on their way: one message to each server, of all tables.

    Args:
        batches: of which the next is taken one step early.
        ids: the ids that the bags will be called with, of a batch.
    """
    last: list[Batch] = []
    for batch in batches:
        wanted = ids(batch)
        if not isinstance(wanted, Mapping) or not all(isinstance(bag, PSEmbeddingBag) for bag in wanted):
            raise ModelError("the ids of a batch are something else than a dict, PSEmbeddingBag -> ids")
        _ask(wanted, len(last))  # the first one is used before any step
        if last:
            yield last.pop()
        last.append(batch)
    yield from last


def push_after(optimizer: Optimizer, client: RowClient) -> None:
    """Have `client.step()` called after each `optimizer.step()`.

    Not with a `torch.amp.GradScaler`: `scaled_step` is for that, and a step that comes from one raises ModelError.
    """
    optimizer.register_step_post_hook(lambda *_: _step(client))


def _step(client: RowClient) -> None:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    for _ in range(CALLERS_MAX):
        frame = None if frame is None else frame.f_back
        scaler = None if frame is None else frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            client.discard()
            raise ModelError(
                "this step comes from a GradScaler, and the gradients of rows are scaled still: nothing was pushed. Leave "
                "push_after out, and call ekko.torch.scaled_step(scaler, optimizer, client) in place of scaler.step(optimizer)"
            )
    client.step()


def scaled_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, client: RowClient) -> bool:
    """What `scaler.step(optimizer)` is without servers: one step of the optimizer and one push, or neither.

    What is pushed is unscaled. Where a gradient, of dense parameters or of rows, is not finite, the optimizer makes no step,
    and the push is an empty one: other workers may wait for its number. Call `scaler.update()` afterwards, as ever. Where
    `torch.distributed` is in use, all ranks call this for each step, and all skip it if one of them has to.

    Args:
        scaler: by which the loss was scaled, before its `update`.
        optimizer: of the dense parameters. Where their gradients were unscaled before, as for clipping, the scaler has
            looked at them by then: of an overflow in rows it does not learn, the optimizer makes its step, and rows have none.
        client: an `ekko.train.Client`.

    Returns:
        Whether the step was made.

    Raises:
        ModelError: the optimizer has no gradient through which the scaler could learn of an overflow in rows.
        EkkoError: as `ekko.train.Client.step`.
    """
    scale = scaler.get_scale()
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    nccl = together and torch.distributed.get_backend() == "nccl"  # sends what lies on devices only
    overflow = torch.tensor(0.0 if client.finite(1.0 / scale) else 1.0, device="cuda" if nccl else "cpu")
    if together:
        torch.distributed.all_reduce(overflow, torch.distributed.ReduceOp.MAX)
    if overflow and scaler.is_enabled():
        _spoil(scaler, optimizer)
    scaler.step(optimizer)
    # Not whether the optimizer was called: one that is fused is, and makes no step by itself.
    made = not scaler.is_enabled() or not any(scaler._found_inf_per_device(optimizer).values())  # noqa: SLF001
    if not made or overflow:  # the second alone where gradients had been unscaled before: rows have no step then
        client.discard()
    client.step(scale=1.0 / scale)
    return made


def _spoil(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Have a scaler see an infinite gradient, so that it skips the step and takes a smaller scale.

    Where it has looked before, it would not see this one, and the optimizer would make a step of it: there nothing is changed.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                kept = parameter.grad.clone()
                parameter.grad.fill_(torch.inf)
                try:
                    scaler.unscale_(optimizer)
                except RuntimeError:
                    parameter.grad.copy_(kept)
                return
    raise ModelError("gradients of rows are not finite, and the optimizer has none that the scaler could see: skip this batch")


class _Ids:
    """The ids of one batch: each once, where each is among them, and where the padding is."""

    __slots__ = ("keys", "padding", "places", "unique")

    def __init__(self, keys: U64, padding_key: int | None) -> None:
        self.keys = keys
        self.unique, self.places = distinct(keys)
        at = [] if padding_key is None else np.flatnonzero(self.unique == np.uint64(padding_key)).tolist()
        self.padding: int | None = at[0] if at else None

    @property
    def wanted(self) -> U64:
        """The keys to pull."""
        return self.unique if self.padding is None else np.delete(self.unique, self.padding)

    def with_padding(self, rows: F32) -> F32:
        """Rows of `unique`, of those of `wanted`: the padding's is zeros."""
        return rows if self.padding is None else np.insert(rows, self.padding, 0.0, axis=0)

    def without_padding(self, gradients: F32) -> F32:
        """Those of `wanted`, of those of `unique`."""
        return gradients if self.padding is None else np.delete(gradients, self.padding, axis=0)


class _Ahead:
    """A batch that was asked for early. `clock`: how many pushes the client has made when it is used."""

    __slots__ = ("clock", "ids", "pulling")

    def __init__(self, ids: _Ids, pulling: Pulling, clock: int) -> None:
        self.ids = ids
        self.pulling = pulling
        self.clock = clock


class _Gradients:
    """What backward left since the last step; the client takes it."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._parts: list[tuple[U64, F32]] = []

    def add_of(self, ids: _Ids, rows: Tensor) -> None:
        """What backward left with pulled rows."""
        gradients, rows.grad = rows.grad, None
        if gradients is not None:
            self.add(ids.wanted, ids.without_padding(gradients.detach().to("cpu", torch.float32).contiguous().numpy()))

    def add(self, keys: U64, gradients: F32) -> None:
        """Gradients of these keys."""
        self._parts.append((keys, gradients))
        if len(self._parts) > GRADIENTS_MAX:
            self._parts = [_summed(self._parts)]

    def finite(self, scale: float) -> bool:
        """Whether all gradients are, times `scale`."""
        return all(bool(np.isfinite(gradients * np.float32(scale)).all()) for _, gradients in self._parts)

    def take(self) -> Iterable[tuple[str, U64, F32]]:
        parts, self._parts = self._parts, []
        return [(self._table, keys, gradients) for keys, gradients in parts]


def _summed(parts: list[tuple[U64, F32]]) -> tuple[U64, F32]:
    """Each key once, in the order of first occurrence, and the sum of its gradients in their order."""
    unique, places = distinct(np.concatenate([keys for keys, _ in parts]))
    total = torch.zeros((len(unique), parts[0][1].shape[1]))
    gradients = np.concatenate([gradients for _, gradients in parts])
    total.index_add_(0, torch.from_numpy(places), torch.from_numpy(gradients))
    return unique, total.numpy()


def _keys(ids: Tensor) -> U64:
    """uint64[n] of any shape of ids."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ModelError(f"ids have dtype {ids.dtype}: expected torch.int64 or torch.int32")
    return ids.detach().reshape(-1).to("cpu", torch.int64).contiguous().numpy().view(np.uint64)


def _ask(wanted: Mapping[PSEmbeddingBag, Tensor], ahead: int) -> None:
    """Ask for all of it in as few messages as there can be: one for each client, and more where bags share a table."""
    rounds: list[tuple[RowClient, dict[str, tuple[PSEmbeddingBag, _Ids]]]] = []
    for bag, ids in wanted.items():
        own = _Ids(_keys(ids).copy(), bag.padding_idx)  # the caller may have one buffer for all batches
        for client, tables in rounds:
            if client is bag._client and bag.table not in tables:  # noqa: SLF001
                tables[bag.table] = (bag, own)
                break
        else:
            rounds.append((bag._client, {bag.table: (bag, own)}))  # noqa: SLF001
    for client, tables in rounds:
        pulling = client.pull_async({table: own.wanted for table, (_, own) in tables.items()}, ahead=ahead)
        for bag, own in tables.values():
            bag._expect(_Ahead(own, pulling, client.clock + ahead))  # noqa: SLF001


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _pulled(bag: PSEmbeddingBag, input: Tensor) -> tuple[Tensor, Tensor, int | None]:  # noqa: A002
    """Rows, a leaf of autograd; int64 of the shape of `input`, where each id's row is among them; where the padding's is."""
    asked = bag._asked(_keys(input))  # noqa: SLF001
    ids = asked.ids
    rows = torch.from_numpy(ids.with_padding(asked.pulling.result()[bag.table])).to(input.device)
    if torch.is_grad_enabled():
        gradients = bag._gradients  # noqa: SLF001
        rows.requires_grad_()
        # The hook holds no reference to the rows: a batch whose loss is never computed is gone with its graph.
        rows.register_post_accumulate_grad_hook(lambda leaf: gradients.add_of(ids, leaf))  # type: ignore[no-untyped-call]
    return rows, torch.from_numpy(ids.places).reshape(input.shape).to(input.device), ids.padding
