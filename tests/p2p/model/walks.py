"""Walks through the model, as they are written down: "write 0 1, crash 2 keep, deliver 0 full"."""

from collections.abc import Sequence
from typing import Any

Action = tuple[Any, ...]  # its kind, and what `state_mode.Model` has for arguments of that name: numbers, then flags
Walk = list[Action]

FLAGS: dict[str, tuple[str, ...]] = {"deliver": ("keep", "full"), "crash": ("keep",)}


def read_walk(text: str) -> Walk:
    """The actions of a text.

    Raises:
        ValueError: a word is neither a number nor a flag of its action.
    """
    walk = Walk()
    for part in text.split(","):
        kind, *words = part.split()
        flags = FLAGS.get(kind, ())
        numbers = [int(word) for word in words if word not in flags]
        walk.append((kind, *numbers, *(flag in words for flag in flags)))
    return walk


def show_walk(walk: Sequence[Action]) -> str:
    """For people, and for `read_walk`."""
    return ", ".join(map(_show, walk))


def _show(action: Action) -> str:
    kind, *values = action
    flags = FLAGS.get(kind, ())
    numbers = values[: len(values) - len(flags)]
    told = [flag for flag, on in zip(flags, values[len(numbers) :], strict=True) if on]
    return " ".join([kind, *map(str, numbers), *told])
