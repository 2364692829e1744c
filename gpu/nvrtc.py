"""NVRTC through ctypes: kernel sources to binaries for any GPU, on machines that have none.

The same compiler and options serve a device (`gpu.backend` loads the binary) and the tests, so that the registers and spills
counted there are those of what runs. CuPy's own compiler is not used: it flushes subnormal numbers to zero, and a row read from
the device would differ from the same row read from the node's memory.
"""

import ctypes
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

from gpu.errors import CompileError
from gpu.sources import Source, cache_folder

# What ekko's kernels are compiled for in the tests: Turing, Ampere, Ampere and Ada for desktops, Hopper, Blackwell.
ARCHES: Final = (75, 80, 86, 89, 90, 100)
# No fused multiply-add: sums of bags are those of the host twin and of NumPy, bit for bit, and memory is the bound anyway.
OPTIONS: Final = ("--std=c++17", "--fmad=false", "--ptxas-options=-v", "--generate-line-info")
MAJORS: Final = (13, 12)  # of CUDA, newest first


@dataclass(frozen=True, slots=True)
class Resources:
    """What one function takes; for one that is called and not launched, the registers are its callers'."""

    registers: int  # per thread
    shared_bytes: int  # per block, static
    stack_bytes: int  # per thread, in device memory
    spill_bytes: int  # stores and loads


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled source."""

    image: bytes  # an ELF file for one architecture
    log: str
    functions: dict[str, Resources]

    @property
    def frugal(self) -> bool:
        """Does no function touch memory that it did not ask for?"""
        return all(not one.stack_bytes and not one.spill_bytes for one in self.functions.values())


class Library:
    """One NVRTC, its functions checked."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def call(self, function: str, *arguments: object) -> None:
        """Call it; raises CompileError for every result but success."""
        result = getattr(self._library, function)(*arguments)
        if result:
            raise CompileError(f"{function}: {self._library.nvrtcGetErrorString(result).decode()}")

    def architectures(self) -> list[int]:
        """What it compiles for."""
        count = ctypes.c_int()
        self.call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self.call("nvrtcGetSupportedArchs", found)
        return list(found)

    def best_for(self, capability: int) -> int:
        """The newest architecture whose binaries a device of this compute capability (90 for 9.0) runs.

        Raises:
            CompileError: there is none.
        """
        fitting = [arch for arch in self.architectures() if arch <= capability and arch // 10 == capability // 10]
        if not fitting:
            raise CompileError("NVRTC {}.{} compiles nothing for sm_{}".format(*self.version, capability))
        return max(fitting)

    def data(self, program: ctypes.c_void_p, what: str) -> bytes:
        """`ProgramLog` or `CUBIN` of a program."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def log(self, program: ctypes.c_void_p) -> str:
        """What the compiler said of a program."""
        return self.data(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")


@lru_cache
def library(major_max: int = MAJORS[0]) -> Library:
    """The newest NVRTC here whose CUDA is at most `major_max`: a driver loads no binaries of a newer CUDA.

    Raises:
        CompileError: there is none.
    """
    for major in (one for one in MAJORS if one <= major_max):
        for path in _candidates(major):
            try:
                return Library(path)
            except OSError:
                continue
    raise CompileError(f"no NVRTC of CUDA {MAJORS[-1]} to {major_max} here: pip install 'ekko-dissemination[cuda{major_max}]'")


def _candidates(major: int) -> Iterator[str]:
    """The wheel's first, since its version is known; then the system's."""
    specification = importlib.util.find_spec("nvidia")
    folder = {13: "cu13", 12: "cuda_nvrtc"}[major]
    for root in (specification.submodule_search_locations or ()) if specification else ():
        yield str(Path(root) / folder / "lib" / f"libnvrtc.so.{major}")
    yield f"libnvrtc.so.{major}"


def compile_for(source: Source, arch: int, nvrtc: Library | None = None) -> Binary:
    """Compile a source.

    Args:
        source: what.
        arch: for which architecture, 90 for sm_90.
        nvrtc: with what; None is the newest here.

    Raises:
        CompileError: with the compiler's log.
    """
    nvrtc = nvrtc or library()
    count = len(source.headers)
    texts = (ctypes.c_char_p * count)(*(text.encode() for _, text in source.headers))
    titles = (ctypes.c_char_p * count)(*(title.encode() for title, _ in source.headers))
    program = ctypes.c_void_p()
    nvrtc.call(
        "nvrtcCreateProgram", ctypes.byref(program), source.text.encode(), f"{source.name}.cu".encode(), count, texts, titles
    )
    try:
        options = [f"--gpu-architecture=sm_{arch}", *OPTIONS, *source.options]
        strings = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        try:
            nvrtc.call("nvrtcCompileProgram", program, len(options), strings)
        except CompileError as error:
            raise CompileError(f"{source.name}.cu for sm_{arch}: {error}\n{nvrtc.log(program)}") from None
        log = nvrtc.log(program)
        return Binary(nvrtc.data(program, "CUBIN"), log, parse(log))
    finally:
        nvrtc.call("nvrtcDestroyProgram", ctypes.byref(program))


_PROPERTIES = re.compile(
    r"Function properties for (?P<name>\S+)\n(?:ptxas)?[\s.]*"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:\nptxas info\s*: Used (?P<registers>\d+) registers(?P<more>[^\n]*))?"
)
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(log: str) -> dict[str, Resources]:
    """Function -> what it takes, of a log of `--ptxas-options=-v`."""
    found = {}
    for match in _PROPERTIES.finditer(log):
        shared = _SHARED.search(match["more"] or "")
        found[match["name"]] = Resources(
            registers=int(match["registers"] or 0),
            shared_bytes=int(shared[1]) if shared else 0,
            stack_bytes=int(match["stack"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
        )
    return found


def cached(source: Source, arch: int, nvrtc: Library | None = None) -> Path:
    """The file of the binary, compiled unless it is there; as `compile_for`."""
    nvrtc = nvrtc or library()
    release = "{}.{}".format(*nvrtc.version)
    path = cache_folder() / f"{source.name}-{source.digest}-sm_{arch}-{release}.cubin"
    if not path.exists():
        image = compile_for(source, arch, nvrtc).image
        with NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
            file.write(image)
        Path(file.name).replace(path)  # whole or not there, whoever else compiles it now
    return path
