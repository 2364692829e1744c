"""A device whose kernels run on the host, lane by lane.

Two kinds of memory. "direct": this machine's own, with its atomics; a launch runs when it is given, in the caller's thread.
"model": as weak as PTX allows (see model.h), with lanes interleaved by an adversary; launches wait until something asks for
their results, so that those of several streams run at once.

    device = HostTwin("model", seed=7)
    kernel = device.kernel("lookup", "lookup")
    device.launch(kernel, grid, block, args, stream)
    device.synchronize()  # raises KernelError when a kernel did what none may

The seed decides everything: the same calls with the same seed give the same run.
"""

import ctypes
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from gpu import sources
from gpu.backend import Array, Event, Kernel, Shape, Stream
from gpu.errors import ArgumentError, CompileError, KernelError
from gpu.twin import abi, build
from gpu.twin.memory import TAG_SHIFT, Memory

NAME: Final = "host-twin"
WARP: Final = 32

Policy = Literal["fixed", "round-robin", "random", "adversarial"]
Reads = Literal["newest", "oldest", "any"]
Stores = Literal["eager", "lazy", "sometimes"]
POLICIES: Final[tuple[Policy, ...]] = ("fixed", "round-robin", "random", "adversarial")
READS: Final[tuple[Reads, ...]] = ("newest", "oldest", "any")
STORES: Final[tuple[Stores, ...]] = ("eager", "lazy", "sometimes")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How runs go. None: another choice at every run, as the seed has it; "fixed" is then left out."""

    policy: Policy | None = None  # who runs next
    reads: Reads | None = None  # which of the values that a load may return it does (model)
    stores: Stores | None = None  # how long stores stay with their lane (model)
    lanes_max: int = 256  # that run at once; at least a block's
    accesses_max: int = 200_000_000  # of a run; then it is said not to end
    report_races: bool = True  # races with plain accesses, and of different sizes, are errors


@dataclass(slots=True)
class Totals:
    """What the twin did so far."""

    runs: int = 0
    launches: int = 0
    accesses: int = 0
    switches: int = 0
    stale: int = 0  # loads that returned an older value than the newest
    delayed: int = 0  # stores that a later one of their lane overtook


class TwinStream:
    """A stream of the twin."""

    def __init__(self, device: "HostTwin") -> None:
        self.device = device
        self.lock = threading.Lock()  # one launch of it at a time
        self.run = 0  # `after` is of the launches that are waiting for this run
        self.after: frozenset[int] = frozenset()

    def synchronize(self) -> None:
        self.device.synchronize()

    def wait(self, event: Event) -> None:
        if not isinstance(event, TwinEvent):
            raise ArgumentError("a stream of the host twin waits for its events only")
        self.after = self.device.waiting(self) | self.device.waiting(event)
        self.run = self.device.totals.runs


class TwinEvent:
    """An event of the twin."""

    def __init__(self, device: "HostTwin") -> None:
        self._device = device
        self.run = 0
        self.after: frozenset[int] = frozenset()
        self._asked = False

    def record(self, stream: Stream | None = None) -> None:
        self.after = self._device.waiting(self._device.at(stream))
        self.run = self._device.totals.runs
        self._asked = False

    def synchronize(self) -> None:
        if self._device.waiting(self):
            self._device.synchronize()

    def done(self) -> bool:
        # Time passes for the twin when somebody waits: who asks twice waits.
        if self._device.waiting(self) and self._asked:
            self._device.synchronize()
        self._asked = True
        return not self._device.waiting(self)


class TwinKernel:
    """A kernel of the twin."""

    def __init__(self, library: abi.Library, kernels: ctypes.CDLL, name: str) -> None:
        self.library = library
        self.name = name
        try:
            self.entry = abi.Entry.in_dll(kernels, f"ekko_kernel_{name}")
        except ValueError:
            raise CompileError(f"no KERNEL is called {name} in that source") from None
        self.threads_max = int(self.entry.threads_max)


class _Named(threading.local):
    """Arrays whose addresses a thread asked for since its last launch, that its structures point to."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []

    def take(self) -> list[Array]:
        arrays, self.arrays = self.arrays, []
        return arrays


@dataclass(slots=True)
class _Waiting:
    kernel: TwinKernel
    grid: int
    block: int
    values: list[bytes]
    after: tuple[int, ...]
    held: tuple[Any, ...]  # arrays, so that they live until it ran


class HostTwin:
    """See the module. Thread-safe in "direct"; in "model" for one thread."""

    def __init__(
        self,
        memory: build.Memory = "direct",
        seed: int = 0,
        schedule: Schedule | None = None,
        *,
        sanitise: bool | None = None,
        memory_bytes: int | None = None,
        folder: Path = sources.FOLDER,
    ) -> None:
        """A twin with memory of its own.

        Args:
            memory: "direct" or "model".
            seed: of all choices.
            schedule: None is lane after lane in "direct", and another adversary at every run in "model".
            sanitise: with ASan and UBSan, which end the process where they find something. None: if the process was started
                with `build.sanitiser_environment()`, as it must be for True.
            memory_bytes: how much memory it has; None: what the host has free.
            folder: where its kernels' sources are.

        Raises:
            CompileError: there is no C++ compiler; the message says what to do.
        """
        if sanitise and not build.sanitised_process():
            raise ArgumentError("a sanitised twin needs a process that was started with build.sanitiser_environment()")
        self.name = NAME
        self.memory: build.Memory = memory
        self.totals = Totals()
        self._schedule = schedule or (Schedule() if memory == "model" else Schedule(policy="fixed"))
        self._sanitise = build.sanitised_process() if sanitise is None else sanitise
        self._folder = folder
        self._seed = seed
        self._library = abi.Library(build.runtime(memory, self._sanitise))
        self._memory = Memory(NAME, memory_bytes, undefined=0xA5 if memory == "model" else None)
        self._default = TwinStream(self)
        self._kernels: dict[tuple[object, ...], TwinKernel] = {}
        self._waiting: list[_Waiting] = []
        self._copies: list[tuple[Array, npt.NDArray[Any], TwinStream]] = []
        self._named = _Named()
        self._lock = threading.Lock()  # of the kernels and the totals

    # --- memory
    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Array:
        return self._memory.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: npt.DTypeLike, stream: Stream | None = None) -> Array:
        array = self.empty(shape, dtype)
        array[...] = 0  # nothing that waits knows it
        return array

    def upload(self, values: npt.NDArray[Any], out: Array | None = None, stream: Stream | None = None) -> Array:
        if out is None:
            out = self.empty(values.shape, values.dtype)
        _check_copy(values, out)
        if self._in_use(out):
            self.synchronize()
        np.copyto(out, values)
        return out

    def download(self, array: Array, out: npt.NDArray[Any] | None = None, stream: Stream | None = None) -> npt.NDArray[Any]:
        self._memory.address(array)
        if out is None:
            out = np.empty(array.shape, array.dtype)
        _check_copy(out, array)
        if self._waiting and self._memory.is_pinned(out):
            self._copies.append((array, out, self.at(stream)))
        else:
            self.synchronize()
            np.copyto(out, array)
        return out

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return self._memory.empty(shape, dtype, pinned=True)

    def address(self, array: Array) -> int:
        """As the protocol says; also of pinned memory. The thread's next launch is taken to use the array."""
        address = self._memory.address(array)
        if self.memory == "model":  # else a launch is done before its caller goes on
            self._named.arrays.append(array)
        return address

    def free_bytes(self) -> int:
        return self._memory.free_bytes()

    def export(self, array: Array) -> dict[str, Any]:
        return self._memory.export(array)

    def open(self, handle: Mapping[str, Any]) -> Array:
        return self._memory.open(handle)

    def to_dlpack(self, array: Array) -> Any:
        self._memory.address(array)
        return array

    # --- streams
    def at(self, stream: Stream | None) -> TwinStream:
        """The stream meant. Raises `ArgumentError` when it is of another device."""
        if stream is None:
            return self._default
        if not isinstance(stream, TwinStream) or stream.device is not self:
            raise ArgumentError(f"{self.name} has no such {type(stream).__name__}")
        return stream

    def stream(self) -> TwinStream:
        return TwinStream(self)

    def event(self) -> TwinEvent:
        return TwinEvent(self)

    def waiting(self, point: "TwinStream | TwinEvent") -> frozenset[int]:
        """The launches, of those that did not run yet, that are before this point."""
        return point.after if point.run == self.totals.runs and self._waiting else frozenset()

    # --- kernels
    def kernel(self, source: str, name: str, defines: Mapping[str, int | str] | None = None) -> TwinKernel:
        key = (source, name, *sorted((defines or {}).items()))
        with self._lock:
            if key not in self._kernels:
                unit = sources.load(source.removesuffix(".cu"), defines, self._folder)
                library = ctypes.CDLL(str(build.kernels(unit, self.memory, self._sanitise)))
                self._kernels[key] = TwinKernel(self._library, library, name)
            return self._kernels[key]

    def launch(
        self, kernel: Kernel, grid: int, block: int, args: Sequence[Array | np.generic], stream: Stream | None = None
    ) -> None:
        if not isinstance(kernel, TwinKernel) or kernel.library is not self._library:
            raise ArgumentError(f"{kernel.name} is no kernel of this {self.name}")
        if grid < 1 or block < 1 or block % WARP or block > kernel.threads_max:
            raise ArgumentError(f"{kernel.name}: {grid} blocks of {block} threads; 1 or more of {WARP} to {kernel.threads_max}")
        values = self._values(kernel, args)
        at = self.at(stream)
        if any(copied is at for _, _, copied in self._copies):
            self.synchronize()  # what is copied is what was there before this launch
        waiting = _Waiting(kernel, grid, block, values, tuple(sorted(self.waiting(at))), (*args, *self._named.take()))
        if self.memory == "direct":
            with at.lock:
                self._run([waiting])
            return
        self._waiting.append(waiting)
        at.run, at.after = self.totals.runs, frozenset([len(self._waiting) - 1])

    def synchronize(self) -> None:
        """Run what waits, all at once. Raises `KernelError`."""
        waiting, self._waiting = self._waiting, []
        copies, self._copies = self._copies, []
        if waiting:
            self._run(waiting)
        for array, out, _ in copies:
            np.copyto(out, array)

    def _values(self, kernel: TwinKernel, args: Sequence[Array | np.generic]) -> list[bytes]:
        entry = kernel.entry
        if len(args) != entry.count:
            raise ArgumentError(f"{kernel.name} takes {entry.count} arguments, not {len(args)}")
        values = []
        for index, argument in enumerate(args):
            if entry.is_global[index]:
                values.append(self._memory.address(argument).to_bytes(8, "little"))
            elif isinstance(argument, np.generic) and argument.nbytes == entry.sizes[index]:
                values.append(argument.tobytes())
            else:
                what = f"{argument.dtype}" if isinstance(argument, np.generic | np.ndarray) else type(argument).__name__
                raise ArgumentError(f"{kernel.name}: argument {index} is {what}, not a number with {entry.sizes[index]} bytes")
        return values

    def _in_use(self, array: Array) -> bool:
        """Whether something that waits may touch the allocation of `array`."""
        if not self._waiting:
            return False
        tag = self._memory.address(array) >> TAG_SHIFT
        words = (word for waiting in self._waiting for value in waiting.values for word in _words(value))
        # What arrays of structures point to is not seen here; they are uploaded as new arrays.
        return any(word >> TAG_SHIFT == tag for word in words) or any(
            np.shares_memory(array, source) for source, _, _ in self._copies
        )

    def _run(self, waiting: list[_Waiting]) -> None:
        with self._lock:
            number = self.totals.runs
            self.totals.runs += 1
            self.totals.launches += len(waiting)
        schedule, seed = self._schedule, self._seed * 1_000_003 + number
        choose = random.Random(seed)
        options = abi.Options(
            seed=seed & (1 << 64) - 1,
            accesses_max=schedule.accesses_max,
            lanes_max=_lanes_of(schedule, waiting),
            policy=POLICIES.index(schedule.policy or choose.choice(POLICIES[1:])),
            reads=READS.index(schedule.reads or choose.choice(READS)),
            stores=STORES.index(schedule.stores or choose.choice(STORES)),
            report_races=schedule.report_races,
        )
        launches = [abi.launch(one.kernel.entry, one.grid, one.block, one.values, one.after) for one in waiting]
        counts, complaint = self._library.run(self._memory, launches, options)
        with self._lock:
            self.totals.accesses += counts.accesses
            self.totals.switches += counts.switches
            self.totals.stale += counts.stale
            self.totals.delayed += counts.delayed
        if complaint:
            raise KernelError(f"{complaint} [HostTwin({self.memory!r}, seed={self._seed}), run {number}]")


def _lanes_of(schedule: Schedule, waiting: list[_Waiting]) -> int:
    largest = max(one.block for one in waiting)
    # Lane after lane: one block at a time is enough, as blocks do not wait for each other.
    return largest if schedule.policy == "fixed" else max(largest, schedule.lanes_max)


def _words(value: bytes) -> list[int]:
    return [int.from_bytes(value[at : at + 8], "little") for at in range(0, len(value) - 7, 8)]


def _check_copy(host: npt.NDArray[Any], array: Array) -> None:
    if host.shape != array.shape or host.dtype != array.dtype:
        raise ArgumentError(f"{host.dtype}{list(host.shape)} on the host, {array.dtype}{list(array.shape)} on the device")
    if not host.flags.c_contiguous or not array.flags.c_contiguous:
        raise ArgumentError("only C-contiguous arrays are copied")
