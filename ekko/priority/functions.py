"""Formulas by name: ekko's own, those that other packages offer, and WebAssembly modules.

A package offers one as an entry point of the group `ekko.priorities`: a function as in `ekko.priority.updates`, or a class that
is made without arguments and can be called like one, an object for each model.

    [project.entry-points."ekko.priorities"]
    by_count = "my_package.priorities:by_count"
"""

import inspect
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from ekko.errors import ConfigError
from ekko.priority.guard import Guarded
from ekko.priority.updates import BUILT_IN, Formula, significance

GROUP: Final = "ekko.priorities"
MODULE_SUFFIXES: Final = (".wasm", ".wat")


def formula_of(name: str) -> Formula:
    """A formula for one model.

    Raises:
        ConfigError: there is none of this name, or it cannot be loaded.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith(MODULE_SUFFIXES):
        return Guarded(name, _module(Path(name)), significance)
    offered = {point.name: point for point in entry_points(group=GROUP)}
    if name not in offered:
        known = ", ".join(map(repr, sorted({*BUILT_IN, *offered})))
        raise ConfigError(f"there is no priority formula {name!r}: there are {known}, or name a .wasm file")
    try:
        loaded = offered[name].load()
        formula = loaded() if inspect.isclass(loaded) else loaded
    except Exception as error:  # somebody else's code
        raise ConfigError(f"priority formula {name!r} ({offered[name].value}) cannot be loaded: {error!r}") from error
    if not callable(formula):
        raise ConfigError(
            f"priority formula {name!r} ({offered[name].value}) is a {type(formula).__name__}: expected a function"
        )
    return Guarded(name, formula, significance)


def _module(path: Path) -> Formula:
    try:
        from ekko.priority.wasm import WasmFormula
    except ImportError as error:
        raise ConfigError(
            f"priority formula {str(path)!r} is a WebAssembly module, for which wasmtime is needed: pip install 'ekko[wasm]'"
        ) from error
    return WasmFormula(path)
