"""What goes wrong with a device. Each says in one line what it is and what to do."""


class DeviceError(Exception):
    """The device, or what talks to it, cannot do what was asked for."""


class DeviceMemoryError(DeviceError):
    """The device has too little memory; nothing was taken."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed:,} bytes of device memory are needed and {free:,} are free")
        self.needed = needed
        self.free = free


class CompileError(DeviceError):
    """A kernel does not compile, or there is no compiler; the compiler's log follows the first line."""


class ArgumentError(DeviceError, ValueError):
    """Wrong device, dtype, shape or memory order of an array; nothing was launched."""
