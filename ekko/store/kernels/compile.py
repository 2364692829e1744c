"""How kernels are compiled, and where the compiled ones are kept.

Numba keeps compiled functions and takes one again when its source file has the same size and time of change. That is not
enough here: a kernel contains the helpers and the offsets of other files, and files out of a wheel may all carry the same time,
so that an upgrade could run yesterday's kernels on today's layout. So the directory's name holds a digest of all the sources
that kernels are made of: those of the store, and for kernels of another package of ekko the files of its folder besides, so
that a change there does not compile the store's anew.

Nor does Numba expect two processes that fill one directory at once. What is compiled of one function (for several signatures,
or, where it is made in a function, for several values that it closes over) has one list of numbered files, which each process
reads, extends and writes: two of them may put different code under one number, and whoever starts next runs float16's loop on
int8's rows. So one process compiles at a time, and the others then load what it made.
"""

import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numba
import xxhash

from ekko.store.kernels.loading import keep

F = TypeVar("F", bound=Callable[..., Any])

# An integer inside a kernel. Numba gives it its machine type; to mypy it may be Python's or NumPy's.
Int: TypeAlias = Any

LOCK_NAME = "lock"
_SOURCES = Path(__file__).parent
_PACKAGE = _SOURCES.parent.parent
_compiling = threading.RLock()  # the same among the threads of this process
_owner: dict[str, int] = {}  # of a directory: which of them it is

# Untyped: the stubs of some versions know neither the setting nor the options.
_numba: Any = numba


def kernel(*signatures: str) -> Callable[[F], F]:
    """Compile a function for these argument types when its module is imported, or load it from the cache.

    Eager, so that no request ever waits for a compiler.
    """

    def compiled(function: F) -> F:
        return cast("F", _compile(function, list(signatures)))

    return compiled


def inline_kernel(function: F) -> F:
    """Compile a helper into the kernels that call it."""
    return cast("F", _compile(function, None, forceinline=True))


def _compile(function: Callable[..., Any], signatures: list[str] | None, *, forceinline: bool = False) -> Any:
    folder = Path(function.__code__.co_filename).parent
    own = folder != _SOURCES and folder.is_relative_to(_PACKAGE)
    directory = _cache_directory(folder) if own else _cache_directory()
    before = _numba.config.CACHE_DIR
    _numba.config.CACHE_DIR = directory or before
    try:  # Numba looks at the setting now, and never again for this function
        options = {"nogil": True, "error_model": "numpy", "forceinline": forceinline}
        if not signatures:
            return _numba.njit(cache=directory is not None, **options)(function)
        compiled = _numba.njit(**options)(function)
        if directory is not None:
            keep(compiled, function)
        with _alone_in(directory):
            for signature in signatures:
                compiled.compile(signature)
        compiled.disable_compile()
        return compiled
    finally:
        _numba.config.CACHE_DIR = before


@contextmanager
def _alone_in(directory: str | None) -> Iterator[None]:
    """Until it ends no other process compiles into this directory."""
    # Loading a compiled function may import a module, which compiles others: one that is in need not wait for itself.
    if directory is None or _owner.get(directory) == threading.get_ident():
        yield
        return
    with _compiling, (Path(directory) / LOCK_NAME).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        _owner[directory] = threading.get_ident()
        try:
            yield
        finally:
            del _owner[directory]


@cache
def _cache_directory(folder: Path = _SOURCES) -> str | None:
    """A directory of these very sources, that we can write to; None when there is none, and each process compiles anew.

    Args:
        folder: where the kernels are.
    """
    sources = _made_of(_SOURCES)
    if folder != _SOURCES:
        sources += sorted(folder.glob("*.py"))
    name = f"ekko-kernels-{_digest(sources)}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") if _has_home() else None
    for parent in (_numba.config.CACHE_DIR, folder / "__pycache__", home):
        if parent:
            try:
                directory = Path(parent) / name
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory):
                    return str(directory)
            except OSError:
                continue
    return None


def _made_of(sources: Path) -> list[Path]:
    """What kernels are made of: the kernels themselves, and the layout whose offsets are constants in them."""
    return [*sorted(sources.glob("*.py")), sources.parent / "layout.py"]


def _digest(sources: list[Path]) -> str:
    digest = xxhash.xxh64()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _has_home() -> bool:
    try:
        Path.home()
    except RuntimeError:
        return False
    return True
