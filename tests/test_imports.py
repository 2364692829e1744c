"""Each module imports by itself, whatever was imported before it: no circle of imports meets a name that is not there yet.

A circle shows only to whoever enters it at one place, as a command does that imports one module late. To start a process for
each of four hundred modules takes minutes, so their imports are followed here as Python does it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ekko.model import CODECS
from sim_cluster.demo.cli import CODEC_NAMES

ROOT = Path(__file__).parent.parent
PACKAGES = ("p2p", "gpu", "ekko", "sim_cluster")


@dataclass(frozen=True)
class Import:
    """`from module import name`, or `import module`, where `name` is empty."""

    module: str
    name: str = ""


@dataclass
class Source:
    """What a module does when it is imported, in its order: it imports, and it binds names."""

    steps: list[Import | str] = field(default_factory=list)


def steps_of(body: list[ast.stmt], package: str) -> Iterator[Import | str]:
    """Of statements that are executed at import."""
    for one in body:
        match one:
            case ast.Import():
                for alias in one.names:
                    yield Import(alias.name)
                    yield alias.asname or alias.name.partition(".")[0]
            case ast.ImportFrom():
                assert one.level == 0, f"{package}: a relative import"
                for alias in one.names:
                    yield Import(one.module or "", alias.name)
                    yield alias.asname or alias.name
            case ast.If() if "TYPE_CHECKING" in ast.unparse(one.test):
                yield from steps_of(one.orelse, package)
            case ast.If() | ast.For() | ast.While():
                yield from steps_of([*one.body, *one.orelse], package)
            case ast.Try():
                yield from steps_of([*one.body, *one.orelse, *one.finalbody], package)
            case ast.With():
                yield from steps_of(one.body, package)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield one.name
            case ast.ClassDef():
                yield from (step for step in steps_of(one.body, package) if isinstance(step, Import))
                yield one.name
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                targets = one.targets if isinstance(one, ast.Assign) else [one.target]
                yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))


def sources(root: Path) -> dict[str, Source]:
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            found[name] = Source(list(steps_of(ast.parse(path.read_text()).body, name)))
    return found


class Interpreter:
    """Imports modules as a fresh interpreter would.

    `settled` are modules that complete wherever they are imported, since nothing that they import meets what is under way.
    """

    def __init__(self, modules: dict[str, Source], settled: set[str]) -> None:
        self._modules = modules
        self._settled = settled
        self._bound: dict[str, set[str]] = {}  # of modules that were begun
        self._under_way: list[str] = []
        self.problem = ""

    def load(self, module: str) -> bool:
        """Import a module and the packages around it; whether all of them are settled."""
        parts = module.split(".")
        settled = True
        for count in range(1, len(parts) + 1):
            if (name := ".".join(parts[:count])) in self._modules:
                settled &= self._execute(name)
        return settled

    def _execute(self, name: str) -> bool:
        if name in self._settled or name in self._bound:
            return name in self._settled
        bound = self._bound[name] = set()
        self._under_way.append(name)
        settled = True
        for step in self._modules[name].steps:
            if self.problem:
                return False
            if isinstance(step, str):
                bound.add(step)
            elif step.module in self._modules:
                settled &= self.load(step.module)
                settled &= self._take(name, step)
        self._under_way.remove(name)
        if settled:
            self._settled.add(name)
        return settled

    def _take(self, name: str, step: Import) -> bool:
        """The name that is imported must be there by now, or be a module."""
        if not step.name or self.problem:
            return True
        if f"{step.module}.{step.name}" in self._modules:
            return self.load(f"{step.module}.{step.name}")
        if step.module in self._under_way and step.name not in self._bound[step.module]:
            self.problem = f"{name} needs {step.name} of {step.module}, which waits for it: {' -> '.join(self._under_way)}"
        return True


def problems(modules: dict[str, Source]) -> dict[str, str]:
    """Module -> why it cannot be imported first."""
    settled: set[str] = set()
    found = {}
    for name in modules:
        interpreter = Interpreter(modules, settled)
        interpreter.load(name)
        if interpreter.problem:
            found[name] = interpreter.problem
    return found


def test_each_module_can_be_imported_first() -> None:
    modules = sources(ROOT)
    assert len(modules) > 300
    assert [*problems(modules).values()][:3] == []


@pytest.mark.parametrize(("late", "fine"), [("LOCK = 'a'", False), ("", True)])
def test_a_circle_is_found_where_python_finds_it(late: str, fine: bool, tmp_path: Path) -> None:
    """As `ekko snapshot` met it: fine from `ekko.store`, and not from `ekko.rundir`."""
    early = "" if late else "LOCK = 'a'"
    files = {
        "ekko/__init__.py": "",
        "ekko/rundir.py": f"{early}\nfrom ekko.store.access import Access\n{late}\n",
        "ekko/store/__init__.py": "from ekko.store.leftovers import note\n",
        "ekko/store/access.py": "class Access: pass\n",
        "ekko/store/leftovers.py": "from ekko.rundir import LOCK\ndef note(): pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = problems(sources(tmp_path))
    for module in ("ekko.rundir", "ekko.store"):
        command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {module}"]
        imports = subprocess.run(command, capture_output=True, timeout=180, check=False).returncode == 0
        assert imports == (module not in found), (module, found)
    assert ("ekko.rundir" not in found) == fine


def test_a_command_loads_nothing_heavy_before_it_is_called() -> None:
    heavy = "zmq", "numpy", "numba", "torch", "pydantic", "rich"
    code = f"import sys; from ekko import cli; cli.register_commands(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout == "[]\n"
    assert tuple(CODECS) == CODEC_NAMES


def test_a_node_loads_neither_scipy_nor_rich_nor_threads_for_matrices() -> None:
    code = (
        "import gc, sys, threading\nfrom pathlib import Path\nfrom ekko.startup import brisk_imports\n"
        "with brisk_imports():\n    import ekko.daemon\n"
        "assert gc.isenabled() and 'numpy' in sys.modules\n"
        "print('scipy' in sys.modules, 'rich' in sys.modules, len([*Path('/proc/self/task').iterdir()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout == "False False 1\n"
