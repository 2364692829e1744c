"""Compiled kernels are kept where only these very sources find them."""

import shutil
from pathlib import Path

import numba
import pytest

from ekko.store import compile as compiling
from ekko.store import rows


def test_kernels_are_kept_under_the_digest_of_their_sources() -> None:
    digest = compiling._digest(Path(compiling.__file__).parent)
    assert f"ekko-kernels-{digest}" in str(rows.gather.stats.cache_path)  # type: ignore[attr-defined]


def test_the_digest_changes_with_any_source(tmp_path: Path) -> None:
    sources = tmp_path / "store"
    shutil.copytree(Path(compiling.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__"))
    before = compiling._digest(sources)
    assert before == compiling._digest(Path(compiling.__file__).parent)
    path = sources / "atomics.py"
    path.write_text(path.read_text().replace("acquire", "release", 1))
    assert compiling._digest(sources) != before


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
