"""Compiles the runtime and the kernels for the host, and keeps the libraries in the user's cache folder.

A library's name is the digest of all that it was made of, so that none is ever used for another source, compiler or flag.
"""

import ctypes
import os
import shutil
import subprocess
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal

from gpu.errors import CompileError
from gpu.sources import FOLDER, Source, cache_folder

Memory = Literal["direct", "model"]

_HERE: Final = Path(__file__).parent
_RUNTIME: Final = ("runtime.cpp", "runtime.h", "twin.h", "model.h", "fiber.h", "random.h")
# No contraction into fused multiply-adds: the kernels are compiled without on devices, too, and results agree bit for bit.
_FLAGS: Final = ("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
_SANITISED: Final = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_COMPILE_S_MAX: Final = 300.0
# Warnings of the language's own about what is meant here: defines that a kernel does not use, and the like, are none of them.
_LOG_LINES_MAX: Final = 40


def flags_of(memory: Memory, sanitise: bool) -> tuple[str, ...]:
    """What a library is compiled with."""
    model = ("-DEKKO_TWIN_MODEL",) if memory == "model" else ()
    return (*_FLAGS, "-DEKKO_TWIN", *model, *(_SANITISED if sanitise else ()))


def runtime(memory: Memory, sanitise: bool) -> Path:
    """The library that runs launches. Raises `CompileError`."""
    files = {name: (_HERE / name).read_text() for name in _RUNTIME} | {"memory.cuh": (FOLDER / "memory.cuh").read_text()}
    return _library("runtime", "runtime.cpp", files, flags_of(memory, sanitise), ())


def kernels(source: Source, memory: Memory, sanitise: bool) -> Path:
    """The library of a source's kernels, bound to its runtime. Raises `CompileError` with the compiler's complaint."""
    files = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.cuh"))} | dict(source.headers)
    files |= {"twin.h": (_HERE / "twin.h").read_text(), "kernel.cpp": f'#line 1 "{source.name}.cu"\n{source.text}'}
    return _library(
        source.name, "kernel.cpp", files, (*flags_of(memory, sanitise), *source.options), (runtime(memory, sanitise),)
    )


def sanitiser_environment() -> dict[str, str]:
    """What a process needs in its environment to load sanitised libraries: the sanitizers come before everything else."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            raise CompileError(f"the sanitised twin needs {name} of the C++ compiler: install its libraries")
        found.append(path)
    # Python itself leaks at its end, and its own memory is none of ours to check.
    return {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def sanitised_process() -> bool:
    """Were the sanitizers loaded before everything else?"""
    return hasattr(ctypes.CDLL(None), "__asan_init")


def _library(name: str, main: str, files: dict[str, str], flags: tuple[str, ...], with_libraries: tuple[Path, ...]) -> Path:
    compiler = _compiler()
    state = blake2b(digest_size=16)
    parts = (
        _version(compiler),
        main,
        *flags,
        *(path.name for path in with_libraries),
        *(part for item in files.items() for part in item),
    )
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    folder = cache_folder() / "twin"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{name}-{state.hexdigest()}.so"
    if not library.exists():
        with TemporaryDirectory(dir=folder) as at:
            for file, text in files.items():
                (Path(at) / file).write_text(text)
            # $ORIGIN: the runtime lies beside the kernels, wherever the cache folder is.
            link = (*map(str, with_libraries), "-Wl,-rpath,$ORIGIN", f"-Wl,-soname,{library.name}")
            _compile(name, [compiler, *flags, "-I", ".", main, *link, "-o", library.name], Path(at))
            (Path(at) / library.name).replace(library)  # at once: other processes may compile the same
    return library


def _compile(name: str, command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_COMPILE_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{name}: the C++ compiler failed: {error}") from error
    if done.returncode:
        log = "\n".join(done.stderr.splitlines()[:_LOG_LINES_MAX])
        raise CompileError(f"{name} does not compile for the host twin:\n{log}")


def _compiler() -> str:
    wanted = os.environ.get("CXX") or "g++"
    found = shutil.which(wanted)
    if found is None:
        raise CompileError(f"the host twin needs a C++ compiler and there is no {wanted}: install g++, or set CXX to another")
    return found


@lru_cache
def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_COMPILE_S_MAX, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{compiler} is no C++ compiler that runs: {error}") from error
    return f"{compiler} {done.stdout}"
