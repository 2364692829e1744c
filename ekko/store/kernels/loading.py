"""Compiled kernels come out of the cache without what Numba does at a load for the sake of compiling.

Numba keeps a compiled function twice: as machine code, and as bitcode for functions that are compiled later and link it. On
loading it parses the bitcode at once, though all that it wants of it then are the names that are defined there. So these names
are kept besides, and the bitcode is parsed when somebody links it. Nor does a function that comes out of the cache need all
that Numba knows for compiling one: that is loaded when something is compiled.

This leans on Numba's inside. Where a release has another one, `keep` leaves all to Numba: slower, and as right.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import llvmlite.binding as _llvm
from numba.core import caching as _caching
from numba.core import runtime as _runtime

# Untyped: Numba's inside is.
llvm: Any = _llvm
caching: Any = _caching
runtime: Any = _runtime

MACHINE_CODE: Final = "object"  # what Numba calls a library in this form
_NOTHING: Final[bytes] = llvm.parse_assembly("").as_bitcode()


class _Impl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    """What is kept of a function: its library with a stub of the bitcode, the rest as Numba has it, and the bitcode."""

    def reduce(self, result: Any) -> Any:
        """What to keep."""
        (name, form, data), *rest = super().reduce(result)
        if form != MACHINE_CODE:
            return ((name, form, data), *rest), (), None
        code, bitcode = data
        return ((name, form, (code, _NOTHING)), *rest), _defined(bitcode), bitcode

    def rebuild(self, target_context: Any, kept: Any) -> Any:
        """A function again, of what was kept."""
        payload, names, bitcode = kept
        # An engine that is asked for a name which it has not would end the process, so Numba looks here first.
        target_context.codegen()._engine._defined_symbols.update(names)  # noqa: SLF001
        result = super().rebuild(target_context, payload)
        if bitcode is not None:
            result.library._get_module_for_linking = partial(_parse, result.library, bitcode)  # noqa: SLF001
        return result


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _Impl

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """As Numba's, without its first step: to load what one needs to compile, which a compiler does by itself."""
        runtime.rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(signature, target_context)


def keep(dispatcher: Any, function: Callable[..., Any]) -> None:
    """Have what is compiled of a function kept, and taken from where it is kept."""
    dispatcher.enable_caching()
    if _is_known(dispatcher):
        dispatcher._cache = _Cache(function)  # noqa: SLF001


def _is_known(dispatcher: Any) -> bool:
    """Whether this release of Numba has what is replaced here."""
    from numba.core.codegen import CPUCodeLibrary

    parts = (
        (CPUCodeLibrary, "_get_module_for_linking"),
        (CPUCodeLibrary, "_unserialize"),
        (caching.Cache, "_load_overload"),
        (caching.Cache, "_guard_against_spurious_io_errors"),
        (dispatcher.targetctx.codegen()._engine, "_defined_symbols"),  # noqa: SLF001
    )
    return all(hasattr(owner, name) for owner, name in parts) and type(dispatcher._cache) is caching.FunctionCache  # noqa: SLF001


def _defined(bitcode: bytes) -> tuple[str, ...]:
    """The names that are defined in it."""
    module = llvm.parse_bitcode(bitcode)
    return tuple(one.name for one in (*module.functions, *module.global_variables) if not one.is_declaration)


def _parse(library: Any, bitcode: bytes) -> Any:
    """What another function links: from now on as if Numba had parsed it at once."""
    library._shared_module = llvm.parse_bitcode(bitcode)  # noqa: SLF001
    del library._get_module_for_linking  # noqa: SLF001
    return library._shared_module  # noqa: SLF001
