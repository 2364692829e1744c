"""Where a setting stands: the line of a mistake, and what is said of it."""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ekko.config.sections import ENVIRONMENT_PREFIX, names_at
from ekko.errors import ConfigError

KeyPath = tuple[str, ...]

_BARE_OR_QUOTED = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_KEY = rf"{_BARE_OR_QUOTED}(?:\s*\.\s*{_BARE_OR_QUOTED})*"
_HEADER = re.compile(rf"\s*\[\[?\s*({_KEY})\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*({_KEY})\s*=")


class Places:
    """Finds the line of a setting in a file that is valid TOML, and words the errors."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines: dict[KeyPath, int] = {}
        table: KeyPath = ()
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _HEADER.match(line):
                table = _key_path(header[1])
                self._note(table, number)
            elif assignment := _ASSIGNMENT.match(line):
                self._note(table + _key_path(assignment[1]), number)

    def _note(self, path: KeyPath, number: int) -> None:
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], number)

    def error(self, path: KeyPath, message: str) -> ConfigError:
        """A `ConfigError` about the setting at `path`; the nearest enclosing line stands for what is inside a line."""
        variable = _environment_variable(path)
        if variable is not None:
            return ConfigError(f"environment variable {variable}: {message}")
        line = next((self._lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._lines), None)
        place = str(self._path) if line is None else f"{self._path}:{line}"
        return ConfigError(f"{place}: {_dotted(path)}: {message}")

    def error_of(self, failure: ValidationError) -> ConfigError:
        """The first of pydantic's complaints, in our words."""
        errors = failure.errors(include_url=False)
        # An unknown key is most often the misspelling of the one that is then missing: it is told first.
        first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
        path = tuple(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] in ("literal_error", "list_type") and path[-1] in ("literal['all']", "list[int]"):
            path = path[:-1]
        message = _describe(str(first["type"]), path, first.get("input"), str(first["msg"]), first.get("ctx", {}))
        more = f" ({len(errors) - 1} more to follow)" if len(errors) > 1 and first["type"] != "extra_forbidden" else ""
        return self.error(path, message + more)


def _key_path(text: str) -> KeyPath:
    """The parts of a dotted key, as tomllib understands them."""
    value: Any = tomllib.loads(f"{text} = 0")
    path: list[str] = []
    while isinstance(value, dict):
        ((key, value),) = value.items()
        path.append(key)
    return tuple(path)


def _dotted(path: KeyPath) -> str:
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in path)


def _environment_variable(path: KeyPath) -> str | None:
    """The variable that gave the value at `path`, if one did."""
    names = {name.upper(): name for name in os.environ}
    for length in range(len(path), 0, -1):
        variable = names.get(ENVIRONMENT_PREFIX + "__".join(path[:length]).upper())
        if variable is not None:
            return variable
    return None


def _describe(kind: str, path: KeyPath, value: object, message: str, context: Mapping[str, object]) -> str:
    match kind:
        case "extra_forbidden":
            near = difflib.get_close_matches(path[-1], names_at(path[:-1]), n=1)
            known = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(names_at(path[:-1]))}"
            return f"unknown {'section' if len(path) == 1 else 'setting'}; {known}"
        case "missing":
            return (
                f"missing; add the section [{path[0]}]"
                if len(path) == 1
                else f"missing; add `{path[-1]} = ...` to [{_dotted(path[:-1])}]"
            )
        case "literal_error" | "list_type" | "int_type" if "hold" in path[2:3]:
            return f"expected 'all' or a list of partitions such as [0, 2], got {value!r}"
        case "literal_error":
            return f"expected {context.get('expected')}, got {value!r}"
        case "string_type":
            return f"expected text in quotes, got {value!r}"
        case "int_type" | "int_parsing" | "int_from_float" if path[-1].endswith("_bytes"):
            return f'expected a number of bytes or a size such as "100GB" or "64 GiB", got {value!r}'
        case "int_type" | "int_parsing" | "int_from_float":
            return f"expected a whole number, got {value!r}"
        case "float_type" | "float_parsing" if path[0] == "snapshots":
            return f'expected a time such as "90s", "10m" or "24h", got {value!r}'
        case "float_type" | "float_parsing":
            return f"expected a number, got {value!r}"
        case "bool_type" | "bool_parsing":
            return f"expected true or false, got {value!r}"
        case "path_type":
            return f"expected a path in quotes, got {value!r}"
        case "list_type":
            return f'expected a list such as ["tcp://127.0.0.1:7800"], got {value!r}'
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"expected a table such as {{ key = value }}, got {value!r}"
        case _:
            return f"{message[:1].lower()}{message[1:]}, got {value!r}"
