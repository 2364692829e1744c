"""CUDA devices through CuPy, which nothing else imports.

This cannot be run where there is no device, so that it is thin: all that decides anything is in `gpu.cache` and in the kernels,
which run on the host twin as they do here.
"""

import ctypes
import math
import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu import nvrtc, sources
from gpu.backend import Array, Event, Kernel, Shape, Stream
from gpu.errors import ArgumentError, DeviceError, DeviceMemoryError

_PROCESS: Final = secrets.token_hex(8)  # with the process's number: no other process has both, in whatever container it runs


Errors = Callable[[], AbstractContextManager[None]]  # within it, errors of CUDA are `DeviceError`s


class CudaStream:
    """A stream of CuPy, or of another library that lends it."""

    def __init__(self, handle: Any, errors: Errors) -> None:
        self.handle = handle
        self._errors = errors

    def synchronize(self) -> None:
        with self._errors():
            self.handle.synchronize()

    def wait(self, event: Event) -> None:
        if not isinstance(event, CudaEvent):
            raise ArgumentError("a stream of CUDA waits for events of CUDA only")
        with self._errors():
            self.handle.wait_event(event.handle)


class CudaEvent:
    """An event of CuPy."""

    def __init__(self, handle: Any, default: CudaStream, errors: Errors) -> None:
        self.handle = handle
        self._default = default
        self._errors = errors

    def record(self, stream: Stream | None = None) -> None:
        if not isinstance(stream, CudaStream | None):
            raise ArgumentError("an event of CUDA is recorded in streams of CUDA only")
        with self._errors():
            self.handle.record((stream or self._default).handle)

    def synchronize(self) -> None:
        with self._errors():
            self.handle.synchronize()

    def done(self) -> bool:
        with self._errors():
            return bool(self.handle.done)


class CudaKernel:
    """A kernel on a device."""

    def __init__(self, name: str, function: Any) -> None:
        self.name = name
        self.function = function
        self.threads_max = int(function.max_threads_per_block)


class CudaDevice:
    """A CUDA device through CuPy, which is imported when the first one is opened.

    Streams do not wait for the default stream, nor it for them. CuPy gives memory that was dropped to the next array at once,
    whatever stream still uses it; so what is handed to a stream is held here until its work is done.
    """

    def __init__(self, index: int) -> None:
        self._cupy = cupy = _import_cupy()
        self._runtime = cupy.cuda.runtime
        self.name = f"cuda:{index}"
        with self._errors():
            count = self._runtime.getDeviceCount()
            if index >= count:
                raise DeviceError(f"{self.name} is not here: {count} CUDA devices are, counted from 0")
            self._index = index
            # Its number is the process's own, since each may be shown other devices.
            uuid = self._runtime.getDeviceProperties(index).get("uuid", b"")  # tells apart what one card is divided into
            self._uuid = f"{cupy.cuda.Device(index).pci_bus_id} {uuid.hex() if isinstance(uuid, bytes) else uuid}"
            driver_cuda = self._runtime.driverGetVersion() // 1000
        if driver_cuda < nvrtc.MAJORS[-1]:
            raise DeviceError(f"the driver is of CUDA {driver_cuda}: CUDA {nvrtc.MAJORS[-1]} or newer is needed")
        self._nvrtc = nvrtc.library(min(driver_cuda, nvrtc.MAJORS[0]))
        self.arch = self._nvrtc.best_for(int(cupy.cuda.Device(index).compute_capability))
        self._default = CudaStream(cupy.cuda.Stream.null, self._errors)
        self._kernels: dict[tuple[object, ...], CudaKernel] = {}
        self._held: dict[int, deque[tuple[CudaEvent, tuple[Array, ...]]]] = {}  # by stream, in its order
        self._lock = threading.RLock()  # of what is held; memory may be given back while it is had
        self._named = _Named()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What `Errors` is."""
        try:
            yield
        except (self._runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError) as error:
            raise DeviceError(f"{self.name}: {error}") from error

    @contextmanager
    def _here(self) -> Iterator[None]:
        """As `_errors`, with this device as the thread's current one."""
        with self._errors(), self._cupy.cuda.Device(self._index):
            yield

    def _at(self, stream: Stream | None) -> CudaStream:
        if not isinstance(stream, CudaStream | None):
            raise ArgumentError(f"{self.name} has no {type(stream).__name__}")
        return stream or self._default

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Array:
        with self._here():
            self._let_go()
            try:
                return self._cupy.empty(shape, dtype)
            except self._cupy.cuda.memory.OutOfMemoryError:
                raise DeviceMemoryError(_bytes(shape, dtype), self.free_bytes()) from None

    def zeros(self, shape: Shape, dtype: npt.DTypeLike, stream: Stream | None = None) -> Array:
        array = self.empty(shape, dtype)
        if array.nbytes:
            with self._here():
                array.data.memset_async(0, array.nbytes, self._at(stream).handle)
                self._hold((array,), stream)
        return array

    def upload(self, values: npt.NDArray[Any], out: Array | None = None, stream: Stream | None = None) -> Array:
        if out is None:
            out = self.empty(values.shape, values.dtype)
        _check_copy(values, out)
        if out.nbytes:
            with self._here():
                source = ctypes.c_void_p(values.ctypes.data)
                # From memory that is not pinned this returns when all of it is staged; from pinned memory at once.
                out.data.copy_from_host_async(source, out.nbytes, self._at(stream).handle)
                self._hold((out, values), stream)
        return out

    def download(self, array: Array, out: npt.NDArray[Any] | None = None, stream: Stream | None = None) -> npt.NDArray[Any]:
        if out is None:
            out = np.empty(array.shape, array.dtype)
        _check_copy(out, array)
        if out.nbytes:
            with self._here():
                array.data.copy_to_host_async(ctypes.c_void_p(out.ctypes.data), out.nbytes, self._at(stream).handle)
                self._hold((array, out), stream)
                if not self._pinned(out):
                    self._at(stream).synchronize()
        return out

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        size = _bytes(shape, dtype)
        with self._here():
            memory = self._cupy.cuda.alloc_pinned_memory(max(1, size))
        return np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)

    def stream(self) -> CudaStream:
        with self._here():
            return CudaStream(self._cupy.cuda.Stream(non_blocking=True), self._errors)

    def borrow(self, pointer: int) -> CudaStream:
        """Another library's stream, by the address of its `cudaStream_t`: `torch.cuda.current_stream().cuda_stream`."""
        with self._here():
            return CudaStream(self._cupy.cuda.Stream.from_external(_Lent(pointer)), self._errors)

    def event(self) -> CudaEvent:
        with self._here():
            return CudaEvent(self._cupy.cuda.Event(), self._default, self._errors)

    def synchronize(self) -> None:
        with self._here():
            self._runtime.deviceSynchronize()

    def kernel(self, source: str, name: str, defines: Mapping[str, int | str] | None = None) -> CudaKernel:
        key = (source, name, *sorted((defines or {}).items()))
        if key not in self._kernels:
            path = nvrtc.cached(sources.load(source.removesuffix(".cu"), defines), self.arch, self._nvrtc)
            with self._here():
                self._kernels[key] = CudaKernel(name, self._cupy.RawModule(path=str(path)).get_function(name))
        return self._kernels[key]

    def launch(
        self,
        kernel: Kernel,
        grid: int,
        block: int,
        args: Sequence[Array | np.generic],
        stream: Stream | None = None,
    ) -> None:
        if not isinstance(kernel, CudaKernel):
            raise ArgumentError(f"{kernel.name} is no kernel of {self.name}")
        if grid < 1 or block < 1 or block % 32 or block > kernel.threads_max:
            raise ArgumentError(f"{kernel.name}: {grid} blocks of {block} threads; 1 or more of 32 to {kernel.threads_max}")
        values = tuple(self._by_value(kernel, index, argument) for index, argument in enumerate(args))
        used, self._named.arrays = tuple(self._named.arrays), []
        with self._here(), self._at(stream).handle:
            kernel.function((grid,), (block,), values)
            self._hold(used, stream)

    def _by_value(self, kernel: Kernel, index: int, argument: Array | np.generic) -> npt.NDArray[Any]:
        """The bytes of a parameter: CuPy passes an array of NumPy with one element by value."""
        if isinstance(argument, np.generic):
            return np.asarray(argument)
        if not isinstance(argument, np.ndarray | self._cupy.ndarray):
            raise ArgumentError(f"{kernel.name}: argument {index} is no array of {self.name} and no number with a type")
        return np.array(self.address(argument), np.uint64)

    def address(self, array: Array) -> int:
        """As the protocol says; also of pinned memory. The thread's next launch is taken to use the array."""
        self._named.arrays.append(array)
        return self._address(array)

    def _address(self, array: Array) -> int:
        if isinstance(array, self._cupy.ndarray):
            known = array.device.id == self._index
        else:
            known = isinstance(array, np.ndarray) and (not array.size or self._pinned(array))
        if not known:
            raise ArgumentError(f"{type(array).__name__}: an array of {self.name} is needed, or its pinned memory")
        if not array.flags.c_contiguous:
            raise ArgumentError(f"an array of {array.shape} is not C-contiguous")
        if not array.size:
            return 0
        return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)

    def _pinned(self, array: npt.NDArray[Any]) -> bool:
        with self._here():
            return bool(self._runtime.pointerGetAttributes(array.ctypes.data).type == self._runtime.memoryTypeHost)

    def _hold(self, things: tuple[Array | np.generic, ...], stream: Stream | None) -> None:
        """Keep what the work that `stream` has by now uses, until it is done."""
        at = self._at(stream)
        event = CudaEvent(self._cupy.cuda.Event(disable_timing=True), at, self._errors)
        event.record()
        with self._lock:
            self._held.setdefault(at.handle.ptr, deque()).append((event, things))
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            for held in [*self._held.values()]:
                while held and held[0][0].done():
                    held.popleft()

    def free_bytes(self) -> int:
        with self._here():
            return int(self._runtime.memGetInfo()[0] + self._cupy.get_default_memory_pool().free_bytes())

    def export(self, array: Array) -> dict[str, Any]:
        address = self._address(array)
        with self._here():
            base = _allocation(address) if address else 0
            return {
                "device": self._uuid,
                "process": f"{_PROCESS}.{os.getpid()}",
                "memory": self._runtime.ipcGetMemHandle(base).hex() if address else "",
                "base": base,
                "offset": address - base,
                "shape": list(array.shape),
                "dtype": array.dtype.str,
            }

    def open(self, handle: Mapping[str, Any]) -> Array:
        if handle["device"] != self._uuid:
            raise DeviceError(f"the cache is on another device than {self.name}: on {handle['device']}, not {self._uuid}")
        shape, dtype, offset = tuple(handle["shape"]), np.dtype(handle["dtype"]), int(handle["offset"])
        size = offset + _bytes(shape, dtype)
        if not handle["memory"]:
            return self.empty(shape, dtype)
        with self._here():
            if handle["process"] == f"{_PROCESS}.{os.getpid()}":  # CUDA opens no memory in the process that gave it away
                opened = _Opened(int(handle["base"]))
            else:
                flags = self._runtime.cudaIpcMemLazyEnablePeerAccess
                opened = _Opened(self._runtime.ipcOpenMemHandle(bytes.fromhex(handle["memory"]), flags))
                weakref.finalize(opened, self._runtime.ipcCloseMemHandle, opened.address)
            memory = self._cupy.cuda.UnownedMemory(opened.address, size, opened, self._index)
            return self._cupy.ndarray(shape, dtype, self._cupy.cuda.MemoryPointer(memory, offset))

    def to_dlpack(self, array: Array) -> Any:
        """As the protocol says. Memory that was dropped waits for the consumer's stream before it is used anew."""
        self._address(array)
        return _Shown(self, array)

    def lend(self, array: Array, stream: Stream | None) -> Array:
        """The same memory as another array; when that is dropped, it is held until `stream` has come so far."""
        lease = _Lease()
        weakref.finalize(lease, self._hold_late, array, stream).atexit = False
        with self._here():
            memory = self._cupy.cuda.UnownedMemory(array.data.ptr, array.nbytes, lease, self._index)
            return self._cupy.ndarray(array.shape, array.dtype, self._cupy.cuda.MemoryPointer(memory, 0))

    def _hold_late(self, array: Array, stream: Stream | None) -> None:
        with self._here():
            self._hold((array,), stream)


class _Named(threading.local):
    """Arrays whose address a thread asked for since its last launch; structures of addresses keep nothing alive."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []


class _Opened:
    """Another process's memory, mapped as long as this lives."""

    def __init__(self, address: int) -> None:
        self.address = address


class _Lease:
    """Lives as long as somebody has the memory."""


class _Shown:
    """An array for `from_dlpack` of other libraries."""

    def __init__(self, device: CudaDevice, array: Array) -> None:
        self._device = device
        self._array = array

    def __dlpack__(self, *, stream: int | None = None, **more: Any) -> Any:
        """As Python's array API has it; `stream` is the consumer's: None and 1 are the default one, -1 waits for none."""
        own = stream is None or stream in (-1, 0, 1)
        lent = self._device.lend(self._array, None if own or stream is None else self._device.borrow(stream))
        return lent.__dlpack__(stream=stream, **more)

    def __dlpack_device__(self) -> Any:
        """Kind and number."""
        return self._array.__dlpack_device__()


class _Lent:
    """What CuPy asks of a stream that is not its own."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol, `cudaStream_t`."""
        return 0, self._pointer


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            "a CUDA device needs CuPy: pip install 'ekko-dissemination[cuda13]', or [cuda12] if the driver is of CUDA 12"
        ) from error
    return cupy


def _bytes(shape: Shape, dtype: npt.DTypeLike) -> int:
    return math.prod((shape,) if isinstance(shape, int) else shape) * np.dtype(dtype).itemsize


def _check_copy(host: npt.NDArray[Any], array: Array) -> None:
    if host.shape != array.shape or host.dtype != array.dtype:
        raise ArgumentError(f"{host.dtype}{list(host.shape)} on the host, {array.dtype}{list(array.shape)} on the device")
    if not host.flags.c_contiguous or not array.flags.c_contiguous:
        raise ArgumentError("only C-contiguous arrays are copied")


def _allocation(address: int) -> int:
    """Where the allocation begins that an address lies in: CuPy cuts arrays out of larger ones, and handles are of wholes."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    if error := driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)):
        raise DeviceError(f"no allocation is known at {address:#x} (CUDA error {error})")
    return base.value
