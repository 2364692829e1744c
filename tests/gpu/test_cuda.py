"""What can be told of CUDA devices where there is none: that they are missing, and what to do. With one: `conftest.py` runs the
tests of the cache on it too.
"""

import sys
from pathlib import Path

import pytest

from gpu.backend import open_device
from gpu.errors import DeviceError
from gpu.nvrtc import ARCHES, library

ROOT = Path(__file__).parent.parent.parent


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"pip install 'ekko-dissemination\[cuda13\]', or \[cuda12\]"):
        open_device("cuda:0")


@pytest.mark.parametrize("name", ["cuda", "cuda:", "cuda:-1", "cuda:0 ", "gpu", "", "host"])
def test_a_device_of_no_known_name_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="no device is called"):
        open_device(name)


@pytest.mark.parametrize(("capability", "arch"), [(75, 75), (80, 80), (86, 86), (90, 90), (100, 100), (103, 103), (121, 121)])
def test_binaries_are_of_the_devices_own_architecture(capability: int, arch: int) -> None:
    assert library().best_for(capability) == arch


def test_binaries_run_on_later_devices_of_their_generation_only() -> None:
    assert library().best_for(99) == 90
    assert library().best_for(109) == max(arch for arch in library().architectures() if arch // 10 == 10)
    assert set(ARCHES) <= set(library().architectures())
    with pytest.raises(DeviceError, match="compiles nothing for sm_70"):
        library().best_for(70)


def test_cupy_is_imported_by_one_module_and_late() -> None:
    users = [path.relative_to(ROOT) for path in ROOT.glob("[egps]*/**/*.py") if "import cupy" in path.read_text()]
    assert users == [Path("gpu/cuda.py")]
    assert "        import cupy" in (ROOT / users[0]).read_text()
