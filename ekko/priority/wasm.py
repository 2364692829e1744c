"""Formulas in WebAssembly: code that the operator need not trust with the node (paper, section 5.2.1).

A module imports nothing, so it can only compute. It exports its `memory` and

    priority(rows: i32, keys: i32, significance: i32, freshness: i32, age_s: i32, interval_s: i32, moved: i32, drift: i32,
             out: i32)

whose arguments but the first are addresses: of u64[rows] for `keys`, of f32[rows] for the others, as in
`ekko.priority.updates`. It writes f32[rows] at `out`. The node puts the arrays behind whatever memory the module has at its
start.

Limits. Each call has fuel for so many instructions a row, and memory ends at 64 MiB; a module that uses up either traps. Rows
come in parts of 16,384, so the arrays take 655 KiB. After a trap the module begins anew: nothing is left of what it had in its
memory.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import wasmtime

from ekko.errors import ConfigError
from ekko.priority.updates import F32, Updates

# A formula of a few dozen operations a row takes a hundredth of it. All of it is 2 to 5 ms for a step of 1,000 rows.
FUEL_PER_ROW: Final = 2_000
FUEL_PER_CALL: Final = 200_000
MEMORY_BYTES_MAX: Final = 64 << 20
# Code is compiled to what the processor runs, which is several times as much.
MODULE_BYTES_MAX: Final = 8 << 20
ROWS_AT_ONCE: Final = 16_384
_PAGE_BYTES: Final = 65_536
_ROW_BYTES: Final = 8 + 7 * 4
_PARAMETERS: Final = 9


class WasmFormula:
    """One module, for one model.

    Args:
        path: of the module, binary or text.

    Raises:
        ConfigError: it cannot be read, is no module, imports something, or does not export what is asked of it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        settings = wasmtime.Config()
        settings.consume_fuel = True
        engine = wasmtime.Engine(settings)
        self._engine = engine
        try:
            if path.stat().st_size > MODULE_BYTES_MAX:
                raise self._error(f"is larger than {MODULE_BYTES_MAX} bytes")
            self._module = wasmtime.Module.from_file(engine, str(path))
        except (OSError, wasmtime.WasmtimeError) as error:
            raise self._error(f"cannot be used: {str(error).splitlines()[0]}") from error
        self._check()
        self._instance: _Instance | None = None

    def __call__(self, updates: Updates) -> F32:
        """float32[n], whatever the module wrote.

        Raises:
            RuntimeError: it trapped, or ran out of fuel or memory.
        """
        count = updates.keys.size
        out = np.empty(count, np.float32)
        try:
            if self._instance is None:
                self._instance = _Instance(self._engine, self._module)
            for begin in range(0, count, ROWS_AT_ONCE):
                part = slice(begin, min(begin + ROWS_AT_ONCE, count))
                self._instance.run(updates, part, out)
        except (wasmtime.WasmtimeError, wasmtime.Trap) as error:
            self._instance = None
            raise RuntimeError(_reason(error)) from error
        return out

    def _check(self) -> None:
        if imports := [f"{one.module}.{one.name}" for one in self._module.imports]:
            raise self._error(f"imports {', '.join(imports[:3])}: a priority formula gets nothing but arrays")
        exports = {one.name: one.type for one in self._module.exports}
        memory, function = exports.get("memory"), exports.get("priority")
        if not isinstance(memory, wasmtime.MemoryType) or memory.is_64:
            raise self._error("does not export a 32-bit memory named 'memory'")
        wanted = [wasmtime.ValType.i32()] * _PARAMETERS
        if not isinstance(function, wasmtime.FuncType) or function.params != wanted or function.results:
            raise self._error(f"does not export a function 'priority' of {_PARAMETERS} i32 that returns nothing")

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"priority formula {str(self._path)!r} {what}")


class _Instance:
    """A module at work: with memory, where the arrays are behind its own."""

    def __init__(self, engine: wasmtime.Engine, module: wasmtime.Module) -> None:
        self._store = wasmtime.Store(engine)
        self._store.set_limits(memory_size=MEMORY_BYTES_MAX, instances=1, memories=1, tables=16)
        self._store.set_fuel(FUEL_PER_CALL)  # for its start function
        exports = wasmtime.Instance(self._store, module, []).exports(self._store)
        memory, function = exports["memory"], exports["priority"]
        assert isinstance(memory, wasmtime.Memory)
        assert isinstance(function, wasmtime.Func)
        self._memory, self._function = memory, function
        self._begin = memory.grow(self._store, -(-ROWS_AT_ONCE * _ROW_BYTES // _PAGE_BYTES)) * _PAGE_BYTES

    def run(self, updates: Updates, part: slice, out: F32) -> None:
        """Have some rows weighed."""
        floats = (
            updates.significance,
            updates.freshness,
            updates.age_s,
            updates.interval_s,
            updates.moved,
            updates.drift,
        )
        rows = part.stop - part.start
        addresses = [self._write(self._begin, updates.keys[part])]
        for number, column in enumerate(floats):
            addresses.append(self._write(self._begin + ROWS_AT_ONCE * (8 + 4 * number), column[part]))
        target = self._begin + ROWS_AT_ONCE * (8 + 4 * len(floats))
        self._store.set_fuel(FUEL_PER_CALL + FUEL_PER_ROW * rows)
        self._function(self._store, rows, *(_signed(address) for address in (*addresses, target)))
        # The module may have grown its memory, which then lies elsewhere.
        out[part] = np.frombuffer(self._memory.read(self._store, target, target + 4 * rows), np.float32)

    def _write(self, address: int, column: "np.ndarray[Any, Any]") -> int:
        self._memory.write(self._store, np.ascontiguousarray(column).tobytes(), address)
        return address


def _reason(error: Exception) -> str:
    """The line of a trap that says why; the others are where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "trap" in line), lines[0] if lines else type(error).__name__)


def _signed(address: int) -> int:
    return address - (1 << 32) if address >= 1 << 31 else address
