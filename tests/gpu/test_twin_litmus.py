"""The twin's memory allows what PTX allows: each litmus test meets its weak outcome, and never with the fence against it.

An outcome counts only if it was met in some run: a model that is too strong fails here as well as one that is too weak.
"""

from pathlib import Path

import numpy as np
import pytest

from gpu.errors import KernelError
from gpu.twin.twin import HostTwin, Schedule

LITMUS = Path(__file__).parent / "litmus"
ROUNDS = 64
SEEDS = 60


def outcomes(kernel: str, grid: int = 2, seeds: int = SEEDS, *, per: int = 2, **defines: str) -> set[tuple[int, ...]]:
    """What `out` had, by `per` words, over all rounds of all seeds."""
    seen: set[tuple[int, ...]] = set()
    for seed in range(seeds):
        device = HostTwin("model", seed, Schedule(report_races=False), folder=LITMUS)
        memory, out = device.zeros(32 * ROUNDS, np.uint32), device.zeros(per * ROUNDS, np.uint32)
        device.launch(device.kernel("litmus", kernel, defines), grid, 32, [memory, out, np.int64(ROUNDS)])
        seen |= set(map(tuple, device.download(out).reshape(ROUNDS, per).tolist()))
    return seen


@pytest.mark.parametrize(("kernel", "grid"), [("message_passing", 2), ("passed_on", 3)])
def test_a_message_needs_its_fence(kernel: str, grid: int) -> None:
    seen = outcomes(kernel, grid, FENCE="fence()")
    assert (1, 0) not in seen
    assert {(1, 1), (0, 0), (0, 1)} <= seen  # the flag is met, and the data may come before it
    assert (1, 0) in outcomes(kernel, grid)


def test_release_and_acquire_pass_a_message() -> None:
    seen = outcomes("release_acquire")
    assert (1, 0) not in seen
    assert (1, 1) in seen


def test_only_a_sequential_fence_forbids_store_buffering() -> None:
    assert (0, 0) in outcomes("store_buffering")
    assert (0, 0) in outcomes("store_buffering", FENCE="fence()")
    seen = outcomes("store_buffering", FENCE="fence_sc()")
    assert (0, 0) not in seen
    assert {(0, 1), (1, 0), (1, 1)} <= seen


@pytest.mark.parametrize("fence", ["", "fence()"])
def test_stores_of_two_locations_land_in_any_order_without_a_fence(fence: str) -> None:
    """2+2W: without fences both first stores may stay. (PTX allows it even with them: there the model is stronger.)"""
    seen: set[tuple[int, ...]] = set()
    for seed in range(SEEDS):
        device = HostTwin("model", seed, folder=LITMUS)
        memory = device.zeros((ROUNDS, 2, 16), np.uint32)
        kernel = device.kernel("litmus", "two_writers", {"FENCE": fence} if fence else {})
        device.launch(kernel, 2, 32, [memory, device.zeros(1, np.uint32), np.int64(ROUNDS)])
        seen |= set(map(tuple, device.download(memory)[:, :, 0].tolist()))
    assert {(1, 2), (2, 1), (2, 2)} <= seen
    assert ((1, 1) in seen) == (not fence)


def test_a_location_does_not_go_back_but_for_plain_reads() -> None:
    assert outcomes("coherence", 6) == {(0, 0)}
    assert outcomes("plain_coherence", 6) != {(0, 0)}
    assert (1, 0) in outcomes("plain_after_relaxed")


def test_a_lane_meets_what_it_stored() -> None:
    for seed in range(12):
        device = HostTwin("model", seed, folder=LITMUS)
        memory, out = device.zeros(64, np.uint32), device.zeros(1, np.uint32)
        device.launch(device.kernel("litmus", "own_stores"), 2, 32, [memory, out, np.int64(8)])
        assert device.download(out)[0] == 0
        assert (memory == 8).all()


@pytest.mark.parametrize(
    ("defines", "torn"),
    [
        ({}, False),
        ({"WRITER_FENCE": ""}, True),
        ({"READER_FENCE": ""}, True),
        ({"UNLOCK(value)": "lock.relax(0,value)"}, True),
    ],
    ids=["whole", "no-writer-fence", "no-reader-fence", "no-release"],
)
def test_a_seqlock_needs_each_of_its_fences(defines: dict[str, str], torn: bool) -> None:
    accepted = met_torn = 0
    for seed in range(3 * SEEDS):
        device = HostTwin("model", seed, folder=LITMUS)
        lock, row, out = device.zeros(1, np.uint32), device.zeros((2, 4), np.uint32), device.zeros((8, 2), np.uint32)
        device.launch(device.kernel("litmus", "seqlock", defines), 5, 32, [lock, row, out, np.int64(ROUNDS)])
        whole, wrong = device.download(out).sum(axis=0)
        accepted += int(whole)
        met_torn += int(wrong)
    assert accepted
    assert bool(met_torn) == torn


@pytest.mark.parametrize(
    ("fence", "unlock", "exact"),
    [("fence()", "release", True), ("", "release", False), ("fence()", "relax", False)],
)
def test_a_lock_needs_acquire_and_release(fence: str, unlock: str, exact: bool) -> None:
    right = True
    for seed in range(12):
        device = HostTwin("model", seed, folder=LITMUS)
        lock, counter = device.zeros(1, np.uint32), device.zeros(1, np.uint32)
        defines = {"FENCE": fence, "UNLOCK(value)": f"lock.{unlock}(0,value)"}
        device.launch(device.kernel("litmus", "locked", defines), 2, 64, [lock, counter, np.int64(4)])
        right &= int(device.download(counter)[0]) == 2 * 64 * 4
    assert right == exact


def test_sync_orders_a_groups_memory_and_shfl_does_not() -> None:
    assert (1, 0) not in outcomes("group")
    assert (1, 0) in outcomes("group", MEET="")


@pytest.mark.parametrize("policy", ["round-robin", "random", "adversarial"])
@pytest.mark.parametrize("reads", ["newest", "oldest", "any"])
@pytest.mark.parametrize("stores", ["eager", "lazy", "sometimes"])
def test_who_waits_for_a_value_meets_it_under_every_adversary(policy: str, reads: str, stores: str) -> None:
    schedule = Schedule(policy, reads, stores, accesses_max=5_000_000)  # type: ignore[arg-type]
    device = HostTwin("model", 1, schedule, folder=LITMUS)
    lock, counter = device.zeros(1, np.uint32), device.zeros(1, np.uint32)
    device.launch(device.kernel("litmus", "locked", {"FENCE": "fence()"}), 2, 64, [lock, counter, np.int64(3)])
    assert device.download(counter)[0] == 2 * 64 * 3
    # Reads that come late, and stores that stay with their lane, do so for a while.
    device.launch(device.kernel("litmus", "turns", {"FENCE": "fence()"}), 2, 32, [device.zeros(32, np.uint32), np.int64(20)])
    device.synchronize()


def test_plain_accesses_that_race_are_told() -> None:
    device = HostTwin("model", folder=LITMUS)
    memory, out = device.zeros(32, np.uint32), device.zeros(8, np.uint32)
    device.launch(device.kernel("litmus", "plain_coherence"), 2, 32, [memory, out, np.int64(ROUNDS)])
    with pytest.raises(KernelError, match="race: a plain read meets a write of another lane"):
        device.synchronize()
