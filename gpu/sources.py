"""The kernels' sources: `gpu/kernels/NAME.cu`, the headers beside it, and the defines it is compiled with.

A source includes headers of its folder, and `layout.cuh`, which is made of `gpu.layout`; no others, so that NVRTC needs no CUDA
toolkit. The digest covers all that decides
what a compiler makes of it, so that a cached binary is never one of another source.
"""

import atexit
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Final

from gpu.errors import CompileError
from gpu.layout import define_lines

FOLDER: Final = Path(__file__).parent / "kernels"
_KERNEL: Final = re.compile(r"^KERNEL\((\d+),\s*(\w+)", re.M)


@dataclass(frozen=True)
class Source:
    """One translation unit."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]  # name as in #include, text
    defines: tuple[tuple[str, str], ...]  # sorted

    @property
    def kernels(self) -> dict[str, int]:
        """Name of each kernel in it -> threads of a block that it is compiled for, at most."""
        return {name: int(threads) for threads, name in _KERNEL.findall(self.text)}

    @property
    def options(self) -> tuple[str, ...]:
        """The defines, as every compiler takes them."""
        return tuple(f"-D{name}={value}" for name, value in self.defines)

    @cached_property
    def digest(self) -> str:
        """Hex digits of all of it."""
        state = blake2b(digest_size=16)
        for part in (self.name, self.text, *(part for pair in (*self.headers, *self.defines) for part in pair)):
            data = part.encode()
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
        return state.hexdigest()


def names(folder: Path = FOLDER) -> list[str]:
    """Every kernel source there is, sorted."""
    return sorted(path.stem for path in folder.glob("*.cu"))


def load(name: str, defines: Mapping[str, int | str] | None = None, folder: Path = FOLDER) -> Source:
    """Read one source and its headers.

    Raises:
        CompileError: there is no such source.
    """
    path = folder / f"{name}.cu"
    if not path.is_file():
        raise CompileError(f"no kernel source {path.name} in {folder}")
    headers = [(one.name, one.read_text()) for one in sorted(folder.glob("*.cuh"))]
    headers.append(("layout.cuh", f"#pragma once\n{define_lines()}"))
    return Source(
        name, path.read_text(), tuple(headers), tuple(sorted((key, str(value)) for key, value in (defines or {}).items()))
    )


def cache_folder() -> Path:
    """Where binaries are kept between processes; where there is no home to write to, for this process only.

    Only its owner may write there, since what lies there is executed.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ekko" / "gpu"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        pass
    return _folder_of_process()


@lru_cache
def _folder_of_process() -> Path:
    folder = mkdtemp(prefix="ekko-gpu-")
    atexit.register(rmtree, folder, ignore_errors=True)
    return Path(folder)
