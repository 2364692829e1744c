"""Compiled kernels come out of the cache in little more than half of Numba's time.

Numba keeps a compiled function twice: as machine code, and as bitcode for functions that are compiled later and link it. On
loading it parses the bitcode at once, which takes half of the time, though all that it wants of it then are the names that are
defined there. So a stub with these names is kept besides, and the bitcode is parsed when somebody links it.

This leans on Numba's inside. Where a release has another one, `keep` leaves all to Numba: slower, and as right.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import llvmlite.binding as _llvm
from numba.core import caching as _caching

# Untyped: Numba's inside is.
llvm: Any = _llvm
caching: Any = _caching

MACHINE_CODE: Final = "object"  # what Numba calls a library in this form


class _Impl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    """What is kept of a function: its library with a stub of the bitcode, the rest as Numba has it, and the bitcode."""

    def reduce(self, result: Any) -> Any:
        """What to keep."""
        (name, form, data), *rest = super().reduce(result)
        if form != MACHINE_CODE:
            return ((name, form, data), *rest), None
        code, bitcode = data
        return ((name, form, (code, _stub(bitcode))), *rest), bitcode

    def rebuild(self, target_context: Any, kept: Any) -> Any:
        """A function again, of what was kept."""
        payload, bitcode = kept
        result = super().rebuild(target_context, payload)
        if bitcode is not None:
            # Until then Numba has read the stub's names; nothing of it has been linked.
            result.library._get_module_for_linking = partial(_parse, result.library, bitcode)  # noqa: SLF001
        return result


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _Impl


def keep(dispatcher: Any, function: Callable[..., Any]) -> None:
    """Have what is compiled of a function kept, and taken from where it is kept."""
    dispatcher.enable_caching()
    if _is_known(dispatcher):
        dispatcher._cache = _Cache(function)  # noqa: SLF001


def _is_known(dispatcher: Any) -> bool:
    """Whether this release of Numba has what is replaced here."""
    from numba.core.codegen import CPUCodeLibrary

    parts = ((CPUCodeLibrary, "_get_module_for_linking"), (CPUCodeLibrary, "_unserialize"), (caching.Cache, "_load_overload"))
    return all(hasattr(owner, name) for owner, name in parts) and type(dispatcher._cache) is caching.FunctionCache  # noqa: SLF001


def _stub(bitcode: bytes) -> bytes:
    """Bitcode in which the same names are defined, and nothing else."""
    module = llvm.parse_bitcode(bitcode)
    lines = [f'define void @"{one.name}"() {{ unreachable }}' for one in module.functions if not one.is_declaration]
    lines += [f'@"{one.name}" = global i8 0' for one in module.global_variables if not one.is_declaration]
    stub: bytes = llvm.parse_assembly("\n".join(lines)).as_bitcode()
    return stub


def _parse(library: Any, bitcode: bytes) -> Any:
    """What another function links: from now on as if Numba had parsed it at once."""
    library._shared_module = llvm.parse_bitcode(bitcode)  # noqa: SLF001
    del library._get_module_for_linking  # noqa: SLF001
    return library._shared_module  # noqa: SLF001
