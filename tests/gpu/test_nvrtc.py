"""NVRTC without a device: what it compiles, what it says of it, and what is kept."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from gpu import nvrtc
from gpu.errors import CompileError
from gpu.layout import define_lines
from gpu.sources import FOLDER, Source, cache_folder, load, names

SHIFT = """
#include "one.cuh"
extern "C" __global__ void shift(const float* x, float* y, long long n) {
  __shared__ float s[64];
  s[threadIdx.x & 63] = x[threadIdx.x];
  __syncthreads();
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) y[i] = s[(i + ONE) & 63];
}
"""
# An array that is written at places known only when it runs lives in memory: a stack frame.
FRAME = """
extern "C" __global__ void frame(float* y) {
  float a[64];
  for (int i = 0; i < 64; i++) a[i] = 0;
  for (int i = 0; i < 64; i++) a[(int)y[i] & 63] += y[i];
  y[0] = a[(int)y[64] & 63];
}
"""
# 1,024 threads of a block leave 64 registers a thread: 96 sums in use at a time do not fit.
SPILL = """
extern "C" __global__ void __launch_bounds__(1024) spill(float* y) {
  float a[96];
  #pragma unroll
  for (int i = 0; i < 96; i++) a[i] = y[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 96; i++) y[i * 1024 + (threadIdx.x ^ (int)a[95 - i])] = a[i] * a[(i * 7 + 3) % 96];
}
"""


def unit(text: str, name: str = "unit", **defines: str) -> Source:
    return Source(name, text, (("one.cuh", "#ifndef ONE\n#define ONE 1\n#endif\n"),), tuple(sorted(defines.items())))


@pytest.mark.parametrize("arch", nvrtc.ARCHES)
def test_a_kernel_compiles_without_a_device(arch: int) -> None:
    binary = nvrtc.compile_for(unit(SHIFT), arch)
    assert binary.image.startswith(b"\x7fELF")
    (name, taken), *others = binary.functions.items()
    assert (name, others) == ("shift", [])
    assert 4 < taken.registers < 64
    assert (taken.shared_bytes, taken.stack_bytes, taken.spill_bytes) == (256, 0, 0)
    assert binary.frugal


@pytest.mark.parametrize(("text", "what"), [(FRAME, "stack_bytes"), (SPILL, "spill_bytes")])
def test_a_frame_and_a_spill_are_noticed(text: str, what: str) -> None:
    binary = nvrtc.compile_for(unit(text), 80)
    (taken,) = binary.functions.values()
    assert getattr(taken, what) > 0
    assert not binary.frugal


def test_logs_of_older_releases_are_understood() -> None:
    log = (
        "ptxas info    : Compiling entry function 'apply' for 'sm_75'\n"
        "ptxas info    : Function properties for apply\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]\n"
        "ptxas info    : Function properties for _Z4slowf\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    assert nvrtc.parse(log) == {"apply": nvrtc.Resources(40, 1024, 8, 16), "_Z4slowf": nvrtc.Resources(0, 0, 0, 0)}


def test_a_mistake_comes_with_its_line() -> None:
    with pytest.raises(CompileError, match=r"(?s)unit\.cu for sm_90.*unit\.cu\(1\): error.*undefined") as caught:
        nvrtc.compile_for(unit('extern "C" __global__ void f(int* x) { x[0] = nothing; }'), 90)
    assert "ptxas" not in str(caught.value)
    with pytest.raises(CompileError, match="gpu-architecture"):
        nvrtc.compile_for(unit(SHIFT), 12)


def test_defines_and_headers_decide_what_is_compiled() -> None:
    assert nvrtc.compile_for(unit(SHIFT), 80).image != nvrtc.compile_for(unit(SHIFT, ONE="2"), 80).image
    texts = unit(SHIFT), unit(SHIFT, ONE="2"), unit(SHIFT, name="other"), unit(SHIFT + " "), Source("unit", SHIFT, (), ())
    assert len({one.digest for one in texts}) == len(texts)


def test_a_binary_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = nvrtc.cached(unit(SHIFT), 80)
    assert path.read_bytes() == nvrtc.compile_for(unit(SHIFT), 80).image
    assert [*cache_folder().iterdir()] == [path]
    monkeypatch.setattr(nvrtc, "compile_for", lambda *_: pytest.fail("compiled anew"))
    assert nvrtc.cached(unit(SHIFT), 80) == path
    with pytest.raises(pytest.fail.Exception, match="anew"):
        nvrtc.cached(unit(SHIFT), 90)


def test_without_a_home_binaries_are_kept_for_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder().is_dir()
    assert tmp_path not in cache_folder().parents


def test_who_has_no_nvrtc_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda major: iter([f"libnvrtc.so.{major}.nowhere"]))
    with pytest.raises(CompileError, match=r"pip install 'ekko-dissemination\[cuda12\]'"):
        nvrtc.library.__wrapped__(12)


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("//")
    (tmp_path / "b.cuh").write_text("//")
    assert names(tmp_path) == ["a"]
    source = load("a", {"N": 3}, tmp_path)
    assert (source.name, source.text, source.options) == ("a", "//", ("-DN=3",))
    assert dict(source.headers) == {"b.cuh": "//", "layout.cuh": f"#pragma once\n{define_lines()}"}
    with pytest.raises(CompileError, match=r"no kernel source c\.cu"):
        load("c", folder=tmp_path)


def test_a_wheel_has_what_is_compiled_later() -> None:
    """Wheels have what git has of their packages, so nothing that is read when it runs may be ignored by it."""
    root = FOLDER.parent.parent
    assert (
        "gpu" in tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    )
    files = [str(path.relative_to(root)) for folder in ("kernels", "twin") for path in (FOLDER.parent / folder).glob("*.[ch]*")]
    assert len(files) > 15
    ignored = subprocess.run(["git", "check-ignore", *files], cwd=root, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""
