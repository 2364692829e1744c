"""Compiled kernels are kept where only these very sources find them."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numba
import pytest
from numba.core.cpu import CPUContext

from ekko.store.kernels import compile as compiling
from ekko.store.kernels import gather
from ekko.train.optimizers import updates

KERNELS = Path(compiling.__file__).parent


def test_kernels_are_kept_under_the_digest_of_their_sources() -> None:
    digest = compiling._digest(compiling._made_of(KERNELS))
    assert f"ekko-kernels-{digest}" in str(gather.gather.stats.cache_path)  # type: ignore[attr-defined]


def test_kernels_of_another_package_are_kept_beside_it_and_leave_the_stores_alone() -> None:
    own = Path(updates.__file__).parent
    place = str(updates.adagrad.stats.cache_path)  # type: ignore[attr-defined]
    assert place.startswith(str(compiling._cache_directory(own)))
    assert not place.startswith(str(compiling._cache_directory()))


@pytest.mark.parametrize("changed", ["kernels/atomics.py", "layout.py"])
def test_the_digest_changes_with_any_source(changed: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(KERNELS.parent, store, ignore=shutil.ignore_patterns("__pycache__"))
    before = compiling._digest(compiling._made_of(store / "kernels"))
    assert before == compiling._digest(compiling._made_of(KERNELS))
    with (store / changed).open("a") as source:
        source.write("# another\n")
    assert compiling._digest(compiling._made_of(store / "kernels")) != before


def test_a_place_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_a_directory = tmp_path / "file"
    not_a_directory.write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(not_a_directory))
    found = compiling._cache_directory.__wrapped__()
    assert found is not None
    assert not found.startswith(str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert str(compiling._cache_directory.__wrapped__()).startswith(f"{tmp_path}/ekko-kernels-")


def test_other_peoples_functions_keep_their_place() -> None:
    assert "ekko-kernels" not in str(numba.config.CACHE_DIR)


@pytest.mark.processes
def test_one_process_compiles_at_a_time(tmp_path: Path) -> None:
    """Two that extend Numba's list of one function at once may put different code under one name."""
    name = f"ekko-kernels-{compiling._digest(compiling._made_of(KERNELS))}"
    (tmp_path / name).mkdir()
    with (tmp_path / name / compiling.LOCK_NAME).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        other = subprocess.Popen([sys.executable, "-c", "import ekko.store.kernels.gather"], env=environment)
        try:
            # The kernel lists who waits for a lock behind an arrow.
            while not any("->" in line and f" {other.pid} " in line for line in Path("/proc/locks").read_text().splitlines()):
                assert other.poll() is None, "it compiled although the directory was taken"
                time.sleep(0.01)
            assert list((tmp_path / name).glob("**/*.nbi")) == []
        finally:
            other.kill()
            other.wait()


def test_bitcode_out_of_the_cache_is_parsed_when_it_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_cache_directory", lambda: str(tmp_path))

    def add_three(number: int) -> int:
        return number + 3

    def twice(number: int) -> int:
        return 2 * inner(number)  # whatever `inner` is when this is compiled

    inner: Any = compiling.kernel("int64(int64)")(add_three)
    assert inner(4) == 7
    inner = compiling.kernel("int64(int64)")(add_three)
    (library,) = (one.library for one in inner.overloads.values())
    assert inner.stats.cache_hits
    assert "add_three" not in str(library._shared_module), "Numba parsed the whole of it"
    assert "add_three" in str(library._get_module_for_linking())

    inner = compiling.kernel("int64(int64)")(add_three)
    assert compiling.kernel("int64(int64)")(twice)(4) == 14  # compiled with what came out of the cache
    again: Any = compiling.kernel("int64(int64)")(twice)
    assert again.stats.cache_hits
    assert again(5) == 16


def test_what_compiles_is_loaded_when_something_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's knowledge takes longer to load than all kernels."""
    monkeypatch.setattr(compiling, "_cache_directory", lambda: str(tmp_path))
    refreshed = list[object]()
    monkeypatch.setattr(CPUContext, "refresh", lambda context: refreshed.append(context))

    def add_four(number: int) -> int:
        return number + 4

    def add_five(number: int) -> int:
        return number + 5

    assert cast("Any", compiling.kernel("int64(int64)")(add_four))(3) == 7
    assert refreshed
    refreshed.clear()
    again: Any = compiling.kernel("int64(int64)")(add_four)
    assert again(4) == 8
    assert again.stats.cache_hits
    assert not refreshed
    compiling.kernel("int64(int64)")(add_five)
    assert refreshed
