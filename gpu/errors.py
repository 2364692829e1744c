"""Errors of devices. Each message is one line: what was wrong, what was expected, what to do."""


class DeviceError(Exception):
    """Base of every error of a device; raised itself when a device is missing or failed while it ran."""


class DeviceMemoryError(DeviceError):
    """The device has no room. `needed` and `free` are bytes; nothing was allocated."""

    def __init__(self, needed: int, free: int, what: str = "an array") -> None:
        super().__init__(f"{what} needs {needed:,} bytes of device memory, {free:,} are free: give the cache fewer rows")
        self.needed = needed
        self.free = free


class CompileError(DeviceError):
    """A kernel could not be compiled: no compiler, or its complaint."""


class ArgumentError(DeviceError, ValueError):
    """An array or a number that a kernel cannot take: wrong device, dtype, shape, or not contiguous. Nothing was launched."""


class KernelError(DeviceError):
    """A kernel did what no kernel may: out of bounds, a race, a collective with lanes missing, or it never ended.

    Only the host twin can tell. The message has the seed that replays the run.
    """
