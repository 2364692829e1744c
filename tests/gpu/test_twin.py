"""The host twin: arguments, collectives, faults told in one line, streams, memory shared between processes."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpu.backend import Device, open_device
from gpu.errors import ArgumentError, CompileError, DeviceError, DeviceMemoryError, KernelError
from gpu.twin import build
from gpu.twin.twin import POLICIES, HostTwin, Schedule, Totals

LITMUS = Path(__file__).parent / "litmus"


def twin(memory: build.Memory = "model", seed: int = 0, **schedule: object) -> HostTwin:
    return HostTwin(memory, seed, Schedule(**schedule) if schedule else None, folder=LITMUS)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", ["direct", "model"])
@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_every_lane_of_every_block_runs_once(memory: build.Memory, policy: str | None) -> None:
    device = twin(memory, policy=policy, lanes_max=192)
    values = np.arange(10_007, dtype=np.uint32)
    out = device.zeros(values.shape, np.uint32)
    for grid, block in ((1, 32), (7, 64), (200, 64)):
        device.launch(device.kernel("faults", "copy"), grid, block, [device.upload(values), out, np.int64(len(values))])
        np.testing.assert_array_equal(device.download(out), values + 1)


@pytest.mark.parametrize("memory", ["direct", "model"])
@pytest.mark.parametrize("seed", range(8))
def test_collectives_give_what_a_warp_gives(memory: build.Memory, seed: int) -> None:
    device = twin(memory, seed)
    values = np.random.default_rng(seed).integers(0, 1 << 20, 640, dtype=np.uint32)
    sums = device.empty(10, np.uint32)
    device.launch(device.kernel("faults", "sum"), 10, 64, [device.upload(values), sums])
    np.testing.assert_array_equal(device.download(sums), values.reshape(10, 64).sum(axis=1))

    out = device.empty((5, 64), np.uint32)
    device.launch(device.kernel("faults", "votes"), 1, 64, [out])
    lanes = np.arange(64) % 32
    first = lanes & ~7
    expected = np.array([sum(1 << r for r in range(8) if (f + r) % 3 == 0) for f in first])
    same = np.array([sum(1 << other for other in range(32) if other % 5 == lane % 5) for lane in lanes])
    got = device.download(out)
    np.testing.assert_array_equal(got[:4], [expected, same, first == 8, first != 8])
    np.testing.assert_array_equal(got[4].view(np.float32), (first + 3).astype(np.float32))


FAULTS = {
    "plain_race": ("race: a plain", 2),
    "sizes_race": ("racing accesses need one size", 2),
    "lane_missing": (r"ballot of thread \d+ with mask 0xffffffff, which has the bit of thread \d+, which has ended", 1),
    "never_comes": (r"deadlock: \d+ lanes wait .*(block_sync|sync)", 1),
    "foreign_mask": ("ballot with mask 0x000000ff, which has not the calling lane's bit", 1),
    "two_masks": (r"ballot with mask 0x\w+, while thread \d+ waits for it in ballot with mask 0x\w+", 1),
    "shfl_from_outside": (r"shfl with mask 0x000000ff: thread \d+ reads from lane 9, which takes no part", 1),
    "never_ends": ("no end after", 1),
    "shared_overrun": (r"out of bounds: element \d of a shared array of 4", 1),
    "misaligned": ("misaligned: 4 bytes at byte 2", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_with_the_seed(fault: str) -> None:
    complaint, grid = FAULTS[fault]
    for seed in range(5):
        device = twin("model", seed, accesses_max=20_000)
        memory = device.zeros(64, np.uint32)
        memory = memory.view(np.uint8) if fault == "misaligned" else memory
        device.launch(device.kernel("faults", fault), grid, 64, [memory])
        with pytest.raises(KernelError, match=complaint) as caught:
            device.synchronize()
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith(f"[HostTwin('model', seed={seed}), run 0]")
        # The device is as good as before.
        out = device.zeros(64, np.uint32)
        device.launch(device.kernel("faults", "copy"), 2, 64, [device.zeros(64, np.uint32), out, np.int64(64)])
        assert device.download(out).all()


@pytest.mark.parametrize("memory", ["direct", "model"])
@pytest.mark.parametrize("first", [0, 32])
def test_bounds_are_those_of_the_allocation(memory: build.Memory, first: int) -> None:
    """Where other arrays lie behind it, too."""
    device = twin(memory)
    arrays = [device.zeros(64, np.uint32) for _ in range(8)]
    copy = device.kernel("faults", "copy")

    def run(count: int) -> None:
        device.launch(copy, 1, 64, [arrays[3][first:], arrays[4], np.int64(count)])
        device.synchronize()

    run(64 - first)
    with pytest.raises(KernelError, match=r"out of bounds: 4 bytes at byte 256 of an array of 256"):
        run(65 - first)


def test_same_seed_same_run() -> None:
    assert _message(5) == _message(5)
    assert _message(5) != _message(6)


def test_structures_hold_addresses() -> None:
    device = twin()
    arrays = [device.zeros(64, np.uint32) for _ in range(3)]
    layout = np.dtype([("memory", np.uint64), ("count", np.uint64)])
    tables = np.array([(device.address(array), 10 * (index + 1)) for index, array in enumerate(arrays)], layout)
    device.launch(device.kernel("faults", "tables"), 3, 64, [device.upload(tables), tables[0], np.float32(3.5)])
    device.synchronize()
    assert [int(array.sum()) for array in arrays] == [70, 140, 210]


def test_a_launch_keeps_what_its_structures_point_to() -> None:
    device = twin()
    layout = np.dtype([("memory", np.uint64), ("count", np.uint64)])
    array = device.pinned(64, np.uint32)
    array[:] = 0
    by_value = np.array([(device.address(array), 64)], layout)[0]
    kept = array.__array_interface__["data"][0]
    device.launch(device.kernel("faults", "tables"), 1, 64, [device.zeros(1, layout), by_value, np.float32(1)])
    del array
    others = [device.zeros(64, np.uint32) for _ in range(4)]
    assert kept not in {other.__array_interface__["data"][0] for other in others}
    device.synchronize()
    assert not any(other.any() for other in others)
    device.launch(device.kernel("faults", "tables"), 1, 64, [device.zeros(1, layout), by_value, np.float32(1)])
    with pytest.raises(KernelError, match="which is no array of this device"):  # and gone once the launch was done
        device.synchronize()


def test_streams_wait_for_events_and_for_nothing_else() -> None:
    """Without the event, the second launch reads what the first did not write yet, in some run."""
    saw_old = 0
    for seed in range(20):
        for ordered in (True, False):
            device = twin("model", seed, report_races=False)
            copy = device.kernel("faults", "copy")
            first, second = device.stream(), device.stream()
            arrays = [device.zeros(512, np.uint32) for _ in range(3)]
            device.launch(copy, 2, 64, [arrays[0], arrays[1], np.int64(512)], first)
            event = device.event()
            event.record(first)
            assert not event.done()
            if ordered:
                second.wait(event)
            device.launch(copy, 2, 64, [arrays[1], arrays[2], np.int64(512)], second)
            event.synchronize()
            assert event.done()
            if ordered:
                assert (device.download(arrays[2]) == 2).all()
            else:
                saw_old += int((device.download(arrays[2]) == 1).any())
    assert saw_old


def test_launches_of_a_stream_run_in_order() -> None:
    for seed in range(10):
        device = twin("model", seed)
        arrays = [device.zeros(300, np.uint32) for _ in range(5)]
        for before, after in pairwise(arrays):
            device.launch(device.kernel("faults", "copy"), 2, 64, [before, after, np.int64(300)])
        pinned = device.pinned(300, np.uint32)
        device.download(arrays[2], pinned)
        device.launch(device.kernel("faults", "copy"), 2, 64, [arrays[3], arrays[2], np.int64(300)])  # not what was copied
        assert (device.download(arrays[4]) == 4).all()
        assert (pinned == 2).all()
        assert (device.download(arrays[2]) == 4).all()


def test_wrong_arguments_launch_nothing() -> None:
    device, other = twin(), twin()
    copy = device.kernel("faults", "copy")
    array, count = device.zeros(64, np.uint32), np.int64(64)
    matrix = device.zeros((8, 8), np.uint32)
    wrong: list[tuple[str, list[object]]] = [
        ("takes 3 arguments, not 2", [array, count]),
        ("not of host-twin but of the host: upload it first", [np.zeros(64, np.uint32), array, count]),
        ("not of host-twin but of the host", [other.zeros(64, np.uint32), array, count]),
        ("not C-contiguous", [array[::2], array, count]),
        ("not C-contiguous", [matrix.T, array, count]),
        ("argument 2 is int, not a number with 8 bytes", [array, array, 64]),
        ("argument 2 is int32, not a number with 8 bytes", [array, array, np.int32(64)]),
        ("not int64", [count, array, count]),
    ]
    for complaint, args in wrong:
        with pytest.raises(ArgumentError, match=complaint):
            device.launch(copy, 1, 32, args)  # type: ignore[arg-type]
    for grid, block in ((0, 32), (1, 0), (1, 33), (1, 96)):
        with pytest.raises(ArgumentError, match="blocks of"):
            device.launch(copy, grid, block, [array, array, count])
    with pytest.raises(ArgumentError, match="no such TwinStream"):
        device.launch(copy, 1, 32, [array, array, count], other.stream())
    with pytest.raises(ArgumentError, match=r"uint32\[64\] on the host, uint32\[8, 8\] on the device"):
        device.upload(np.zeros(64, np.uint32), matrix)
    device.synchronize()
    assert device.totals.launches == 0


def test_memory_ends_and_comes_back() -> None:
    device = HostTwin(memory_bytes=10_000, folder=LITMUS)
    array = device.empty(2_000, np.uint32)
    assert device.free_bytes() == 2_000
    with pytest.raises(DeviceMemoryError, match="8,000 bytes of device memory, 2,000 are free") as caught:
        device.empty(1_000, np.uint64)
    assert (caught.value.needed, caught.value.free) == (8_000, 2_000)
    view = array[5:10]
    del array
    assert device.free_bytes() == 2_000
    del view
    assert device.free_bytes() == 10_000
    assert device.empty((0, 3), np.uint32).shape == (0, 3)


OTHER_PROCESS = """
import json, sys
import numpy as np
from pathlib import Path
from gpu.errors import DeviceError
from gpu.twin.twin import HostTwin
device = HostTwin(folder=Path(sys.argv[1]))
handles = json.loads(sys.argv[2])
whole, part, empty = (device.open(handle) for handle in handles)
assert empty.shape == (0, 4)
before = part.tolist()
device.launch(device.kernel("faults", "copy"), 1, 32, [part, part, np.int64(len(part))])
print(json.dumps([before, whole.sum().item()]))
"""


@pytest.mark.processes
def test_memory_is_shared_with_another_process() -> None:
    device = HostTwin(folder=LITMUS)
    array = device.upload(np.arange(3_000, dtype=np.uint32).reshape(1_000, 3))
    handles = [device.export(one) for one in (array, array.reshape(-1)[2_000:2_010], device.empty((0, 4), np.uint8))]
    command = [sys.executable, "-c", OTHER_PROCESS, str(LITMUS), json.dumps(handles)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    before, total = json.loads(done.stdout)
    assert before == list(range(2_000, 2_010))
    assert total == 2_999 * 3_000 // 2 + 10
    assert int(array.sum()) == total  # what the other process wrote is here
    np.testing.assert_array_equal(device.open(handles[1]), np.arange(2_001, 2_011))  # and a process opens its own

    del array
    with pytest.raises(DeviceError, match="gone"):
        device.open(handles[0])
    with pytest.raises(DeviceError, match="on cuda:0, not on host-twin"):
        device.open(handles[1] | {"device": "cuda:0"})


def test_complaints_of_the_compiler_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text(
        '#include "warp.cuh"\nKERNEL(32, broken, Global<u32> out) {\n    out.write(0, nothing);\n}\n'
    )
    device = HostTwin(folder=tmp_path)
    with pytest.raises(CompileError, match=r"broken\.cu:3.*nothing"):
        device.kernel("broken", "broken")
    with pytest.raises(CompileError, match=r"no kernel source absent\.cu"):
        device.kernel("absent", "absent")
    with pytest.raises(CompileError, match="no KERNEL is called other"):
        twin().kernel("faults", "other")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompileError, match=r"there is no g\+\+: install g\+\+, or set CXX"):
        HostTwin()


def test_it_is_a_device() -> None:
    device: Device = open_device("host-twin")
    array = device.upload(np.arange(4))
    assert np.from_dlpack(device.to_dlpack(array)).tolist() == [0, 1, 2, 3]
    with pytest.raises(ArgumentError, match="sanitiser_environment"):
        HostTwin(sanitise=True)


def test_threads_launch_at_once_in_memory_of_the_machine() -> None:
    """Each has its own scheduler; the lock in device memory is one for all of them."""
    device = HostTwin("direct", folder=LITMUS)
    lock, counter = device.zeros(1, np.uint32), device.zeros(1, np.uint32)
    kernel = device.kernel("litmus", "locked", {"FENCE": "fence()"})

    def run() -> None:
        stream = device.stream()
        for _ in range(20):
            device.launch(kernel, 2, 64, [lock, counter, np.int64(2)], stream)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run) for _ in range(4)]:
            done.result()
    assert counter[0] == 4 * 20 * 2 * 64 * 2


def test_fibers_of_the_c_library_do_where_there_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors other than x86-64 have these."""
    seeds = range(3)
    runs = list(map(_message, seeds))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DEKKO_TWIN_UCONTEXT"))
    assert list(map(_message, seeds)) == runs


def _message(seed: int) -> tuple[list[int], Totals]:
    device = twin("model", seed)
    memory, out = device.zeros(32 * 64, np.uint32), device.zeros(128, np.uint32)
    device.launch(device.kernel("litmus", "message_passing"), 2, 32, [memory, out, np.int64(64)])
    return device.download(out).tolist(), device.totals


SANITISED = """
import sys
import numpy as np
from pathlib import Path
from gpu.errors import KernelError
from gpu.twin.twin import HostTwin
for memory in ("direct", "model"):
    device = HostTwin(memory, 1, sanitise=True, folder=Path(sys.argv[1]))
    out = device.upload(np.full(640, 5, np.uint32))
    device.launch(device.kernel("faults", "sum"), 10, 64, [out, device.zeros(10, np.uint32)])
    device.launch(device.kernel("faults", "votes"), 1, 64, [out])
    lock, counter = device.zeros(1, np.uint32), device.zeros(1, np.uint32)
    device.launch(device.kernel("litmus", "locked", {"FENCE": "fence()"}), 2, 64, [lock, counter, np.int64(3)])
    assert device.download(counter)[0] == 2 * 64 * 3
    try:  # leaves lanes where they are
        device.launch(device.kernel("faults", "never_comes"), 1, 64, [out])
        device.synchronize()
    except KernelError:
        device.launch(device.kernel("faults", "votes"), 3, 64, [out])
    if len(sys.argv) > 2:
        device.launch(device.kernel("faults", sys.argv[2]), 1, 64, [out])
        device.synchronize()
print("clean")
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [(None, None), ("stack_overrun", "stack-buffer-overflow"), ("undefined", "signed integer overflow")],
)
def test_sanitisers_see_what_lanes_do_on_their_stacks(fault: str | None, complaint: str | None) -> None:
    command = [sys.executable, "-c", SANITISED, str(LITMUS), *([fault] if fault else [])]
    environment = os.environ | build.sanitiser_environment()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    if complaint is None:
        assert done.returncode == 0, done.stderr
        assert done.stdout == "clean\n"
        assert not done.stderr
    else:
        assert done.returncode != 0
        assert re.search(complaint, done.stderr), done.stderr
