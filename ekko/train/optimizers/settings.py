"""Settings of optimisers and initialisers: frozen dataclasses, read from a plain mapping as TOML gives it."""

import math
from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from ekko.errors import ConfigError

T = TypeVar("T")

_BOUNDS = "bounds"


class Bounds:
    """What a number may be: finite, from `least` on or above `above`, up to `most` or below `below`."""

    def __init__(
        self, *, least: float | None = None, above: float | None = None, most: float | None = None, below: float | None = None
    ) -> None:
        self._low, self._is_open = (least, False) if above is None else (above, True)
        self._most, self._below = most, below

    def has(self, number: float) -> bool:
        if not math.isfinite(number):
            return False
        if self._low is not None and (number <= self._low if self._is_open else number < self._low):
            return False
        if self._most is not None and number > self._most:
            return False
        return self._below is None or number < self._below

    def __str__(self) -> str:
        parts = []
        if self._low is not None:
            parts.append(f"{'above' if self._is_open else 'from'} {self._low:g}")
        if self._most is not None:
            parts.append(f"up to {self._most:g}")
        if self._below is not None:
            parts.append(f"below {self._below:g}")
        return "a number " + " and ".join(parts) if parts else "a finite number"


def number(default: float, bounds: Bounds) -> Any:
    """A field of a settings dataclass: a number, or a tuple of them, within bounds."""
    return field(default=default, metadata={_BOUNDS: bounds})


def numbers(default: tuple[float, ...], bounds: Bounds) -> Any:
    """The same for a list of so many numbers as the default has."""
    return field(default=default, metadata={_BOUNDS: bounds})


def check(what: str, settings: Any) -> None:
    """That every field has the type and the bounds of its declaration; numbers become float, lists tuples.

    Raises:
        ConfigError: names the first that has not.
    """
    for one in fields(settings):
        value = getattr(settings, one.name)
        object.__setattr__(settings, one.name, _checked(f"{what}'s {one.name}", one, value))


def _checked(what: str, one: "Field[Any]", value: Any) -> Any:
    default = one.default
    bounds: Bounds | None = one.metadata.get(_BOUNDS)
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            raise ConfigError(f"{what} is {value!r}: expected {len(default)} numbers, such as {list(default)}")
        assert bounds is not None
        return tuple(_number(f"{what}[{i}]", bounds, element) for i, element in enumerate(value))
    if bounds is not None:
        whole = isinstance(default, int) and not isinstance(default, bool)
        return _whole(what, bounds, value) if whole else _number(what, bounds, value)
    if not isinstance(value, type(default)):
        expected = "true or false" if isinstance(default, bool) else f"text such as {default!r}"
        raise ConfigError(f"{what} is {value!r}: expected {expected}")
    return value


def _number(what: str, bounds: Bounds, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not bounds.has(value):
        raise ConfigError(f"{what} is {value!r}: expected {bounds}")
    return float(value)


def _whole(what: str, bounds: Bounds, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not bounds.has(value):
        raise ConfigError(f"{what} is {value!r}: expected a whole number, {str(bounds).removeprefix('a number ')}")
    return value


def chosen(kind: str, kinds: Mapping[str, type[T]], settings: object) -> T:
    """One of several dataclasses by its `name`, with the rest of the settings as its fields.

    Raises:
        ConfigError: one line: what is wrong, and what there is.
    """
    example = next(iter(kinds))
    if not isinstance(settings, Mapping):
        raise ConfigError(f'{kind} is {settings!r}: expected a table such as {{ name = "{example}" }}')
    rest = dict(settings)
    name = rest.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        problem = "has no name" if name is None else f"has the name {name!r}"
        raise ConfigError(f"{kind} {problem}: expected one of {', '.join(kinds)}")
    known = [one.name for one in fields(kinds[name])]  # type: ignore[arg-type]
    for key in rest:
        if key not in known:
            raise ConfigError(f"{kind} {name!r} has no setting {key!r}: it has {', '.join(known) or 'none'}")
    return kinds[name](**rest)
