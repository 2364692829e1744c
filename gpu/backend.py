"""What the caches need of a device. Two kinds have it: a CUDA device through CuPy, and the host twin.

Arrays are the device's own (`cupy.ndarray`, or `numpy.ndarray` over memory that the twin allocated) and C-contiguous.
Nothing here synchronises unless its line says so.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpu.errors import DeviceError

Array = Any  # a device's own array; it has .shape, .dtype, .nbytes, slices, and .reshape
Shape = int | tuple[int, ...]


class Stream(Protocol):
    """Work that runs in the order it was given. Work of two streams may run at once."""

    def synchronize(self) -> None:
        """Wait until all that was given to this stream is done."""

    def wait(self, event: "Event") -> None:
        """What is given to this stream from now on starts after `event`; the caller does not wait."""


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Stream | None = None) -> None:
        """The event is now the end of what `stream` was given so far."""

    def synchronize(self) -> None:
        """Wait until the recorded point is passed; at once if none was recorded."""

    def done(self) -> bool:
        """Whether the recorded point is passed. Never waits."""


class Kernel(Protocol):
    """A compiled kernel: one `KERNEL(...)` of a source, with the values of its defines."""

    name: str
    threads_max: int


class Device(Protocol):
    """Memory and streams of one device, and kernels that run there. `stream=None` is the device's default stream."""

    name: str

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Array:
        """An array with undefined content. Raises `DeviceMemoryError`."""

    def zeros(self, shape: Shape, dtype: npt.DTypeLike, stream: Stream | None = None) -> Array:
        """An array of zeros, as later work of `stream` sees it. Raises `DeviceMemoryError`."""

    def upload(self, values: npt.NDArray[Any], out: Array | None = None, stream: Stream | None = None) -> Array:
        """Copy to a new array, or into `out` of the same dtype and shape; in order with `stream`.

        The host's memory may be changed again once this returned, unless it is pinned.
        """

    def download(self, array: Array, out: npt.NDArray[Any] | None = None, stream: Stream | None = None) -> npt.NDArray[Any]:
        """Copy to the host in order with `stream`. Synchronises that stream, unless `out` is pinned memory."""

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Host memory that copies to and from the device need no staging for. Undefined content."""

    def stream(self) -> Stream:
        """A new stream."""

    def event(self) -> Event:
        """A new event, recorded nowhere."""

    def synchronize(self) -> None:
        """Wait until every stream is done."""

    def kernel(self, source: str, name: str, defines: Mapping[str, int | str] | None = None) -> Kernel:
        """`KERNEL(..., name, ...)` of `gpu/kernels/SOURCE` ("lookup.cu"); compiled when first asked for, then kept.

        Raises `CompileError`.
        """

    def launch(
        self, kernel: Kernel, grid: int, block: int, args: Sequence[Array | np.generic], stream: Stream | None = None
    ) -> None:
        """Run `grid` blocks of `block` threads. Returns without waiting.

        Args:
            kernel: of this device.
            grid: blocks, at least 1.
            block: threads a block: a multiple of 32, at most what the kernel was compiled for.
            args: in the kernel's order: arrays of this device for `Global<T>`, NumPy scalars of the parameter's exact
                type for numbers, `numpy.void` for structures.
            stream: where to run.

        Raises:
            ArgumentError: an array of another device or not contiguous, a number without a type, or a bad grid.
        """

    def address(self, array: Array) -> int:
        """What a `Global<T>` inside a structure holds to point to `array`, perhaps a pinned one; 0 if it has no elements.

        The thread's next launch is taken to use the array, and keeps it until it is done. Who stores the address for longer
        keeps the array. Raises `ArgumentError`: the array is not of this device, or not contiguous.
        """

    def free_bytes(self) -> int:
        """How much memory can still be allocated."""

    def export(self, array: Array) -> dict[str, Any]:
        """A handle, JSON-able, by which another process on this machine opens the memory of `array`."""

    def open(self, handle: Mapping[str, Any]) -> Array:
        """The array behind another process's handle. Raises `DeviceError` when it is gone or of another device."""

    def to_dlpack(self, array: Array) -> Any:
        """An object with `__dlpack__` over the same memory."""


def open_device(name: str) -> Device:
    """A device by its name.

    Args:
        name: "cuda:0" and so on, or "host-twin".

    Raises:
        DeviceError: there is no such device, or what it needs is not installed; the message says what to install.
    """
    if name == "host-twin":
        from gpu.twin.twin import HostTwin

        return HostTwin()
    if match := re.fullmatch(r"cuda:(\d+)", name):
        from gpu.cuda import CudaDevice

        return CudaDevice(int(match[1]))
    raise DeviceError(f"no device is called {name!r}: cuda:0, cuda:1, ... and host-twin are")
