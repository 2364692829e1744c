"""Values are as Python's frozen dataclasses are, but for what it costs to make one."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ekko import local
from p2p import messages, replica, values

MODULES = (messages, replica, local)


@values.dataclass(frozen=True, slots=True)
class Ours:
    a: int
    b: tuple[int, ...] = ()
    c: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Pythons:
    a: int
    b: tuple[int, ...] = ()
    c: int = dataclasses.field(default=0, compare=False)


@values.dataclass(frozen=True, slots=True, eq=False)
class Single:
    a: int


def test_hash_and_equality_are_those_of_a_frozen_one() -> None:
    assert Ours(1, (2,), 3) == Ours(1, (2,), 4)
    assert Ours(1, (2,)) != Ours(1, (3,))
    assert hash(Ours(1, (2,), 3)) == hash(Pythons(1, (2,), 3)) == hash(Ours(1, (2,), 4))
    assert dataclasses.replace(Ours(1), b=(5,)) == Ours(1, (5,))
    assert repr(Ours(1)) == "Ours(a=1, b=(), c=0)"
    assert not hasattr(Ours(1), "__dict__")


def test_one_without_equality_is_only_itself() -> None:
    one, other = Single(1), Single(1)
    assert one != other
    assert len({one, other}) == 2


def test_what_changes_is_not_made_here() -> None:
    with pytest.raises(AssertionError, match="no value"):
        values.dataclass(frozen=False, slots=True)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_value_of_the_hot_path_is_made_without_the_guard(module: ModuleType) -> None:
    found = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if dataclasses.is_dataclass(kind)]
    own = [kind for kind in found if kind.__module__.startswith(module.__name__)]
    guarded = [kind.__name__ for kind in own if kind.__setattr__ is not object.__setattr__]
    assert own
    assert guarded == []


def test_the_type_checker_refuses_a_change(tmp_path: Path) -> None:
    program = tmp_path / "changes.py"
    program.write_text("from p2p.messages import Now\n\nnow = Now(1, 2)\nnow.unix_ms = 3\n")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(program)]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert 'Property "unix_ms" defined in "Now" is read-only' in found.stdout, found.stdout + found.stderr
