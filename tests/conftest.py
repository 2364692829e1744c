"""Hypothesis profiles, the order for workers side by side, and the check that no test leaves a process behind."""

import contextlib
import gc
import os
import signal
import time
from collections.abc import Iterator
from itertools import chain, groupby
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Quick is what continuous integration runs, with the same examples each time: what fails there is what was changed. Long draws
# others each time, and is for a machine with time: HYPOTHESIS_PROFILE=long.
# No deadline: a shared machine makes single examples slow, and that says nothing about the code.
settings.register_profile(
    "quick", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
settings.load_profile(PROFILE)

# In this share of a worker's tests, from its first one on, are all that start processes.
EARLY = 0.85

# A child that was told to end is given this long to be gone.
CHILD_EXIT_S_MAX = 60.0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that take long run on request: what they are about has a quicker test, too."""
    if PROFILE != "long" and item.get_closest_marker("long"):
        pytest.skip("runs with HYPOTHESIS_PROFILE=long")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers side by side get files that start processes, which wait a lot, evenly among those that only compute.

    Nearly evenly: each worker begins with as many tests as the others, and takes some of another's when it has none left. What
    comes last of its own are tests that compute, which are short: the end is not one worker's longest test.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    waiting = [tests for tests in files if any(item.get_closest_marker("processes") for item in tests)]
    computing = [tests for tests in files if tests not in waiting]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    evenly = [divmod((number + 0.5) / len(waiting) * workers, 1.0) for number in range(len(waiting))]
    places = [(worker + EARLY * place) / workers for worker, place in evenly]  # by share of the tests that compute
    count, mixed = sum(map(len, computing)), list[pytest.Item]()
    done = 0
    for tests in computing:
        while waiting and places[0] * count <= done:
            mixed += waiting.pop(0)
            places.pop(0)
        mixed += tests
        done += len(tests)
    items[:] = [*mixed, *chain(*waiting)]


def pytest_collection_finish() -> None:
    """Libraries and three thousand tests stay: the collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


def child_processes() -> dict[int, str]:
    """Pid -> command line of every living child of this process, the interpreter's own helper excepted."""
    tracker = getattr(getattr(resource_tracker, "_resource_tracker", None), "_pid", None)
    children: dict[int, str] = {}
    for pid in _children_of_threads():
        if pid != tracker:
            with contextlib.suppress(OSError):  # it ended while we looked
                entry = Path("/proc") / str(pid)
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if int(parent) == os.getpid() and state != "Z":
                    children[pid] = (entry / "cmdline").read_text().replace("\0", " ").strip()
    return children


def _children_of_threads() -> list[int]:
    """Pids of children, as the kernel lists them; where it is built without that, of all processes."""
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            pids += map(int, (task / "children").read_text().split())
        except OSError:  # the thread ended while we looked, or the kernel has no such file
            if task.exists():
                return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return pids


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail a test that leaves a child process running, and end it, so that it disturbs no later test."""
    before = child_processes()
    yield
    deadline = time.monotonic() + CHILD_EXIT_S_MAX
    while left := {pid: name for pid, name in child_processes().items() if pid not in before}:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"processes left running: {left}")
        time.sleep(0.01)
