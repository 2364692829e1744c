"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the tests of interleavings, in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.twin import build

HERE = Path(__file__).parent


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = os.environ | build.sanitiser_environment()
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]
    return done.stdout


@pytest.mark.processes
def test_look_ups_beside_writes_are_clean() -> None:
    assert "1 passed" in run(str(HERE / "test_interleavings.py"), "-k", "beside_each_other and look_beside_apply and not long")


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.timeout(1_800)
def test_all_interleavings_are_clean() -> None:
    assert " passed" in run(str(HERE / "test_interleavings.py"), "-k", "not for_long and not many_keys")
