"""Launches of several streams at once, on memory as weak as PTX's: no reader meets what was never written, and what writers
leave is what the reference leaves.

A failure names the seed; `scenario(beside.Model(seed))` replays it. `test_planted_kernel_bugs.py` shows that these can fail.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from gpu import layout
from gpu.kernels import launchers
from gpu.layout import CODECS, Shape
from tests.gpu import beside
from tests.gpu.beside import Model, World

DIMS = (1, 3, 16, 64, 100, 128)
KINDS = list(itertools.product(CODECS, DIMS))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "BLOCK", beside.BLOCK)


def play(scenario: Callable[..., None], seeds: range, *how: object) -> None:
    for seed in seeds:
        try:
            scenario(Model(seed), *how)
        except Exception as error:
            error.add_note(f"{scenario.__name__}(Model({seed}), *{how})")
            raise


@pytest.mark.parametrize("scenario", beside.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_launches_beside_each_other(scenario: Callable[[Model], None]) -> None:
    play(scenario, range(10))


@pytest.mark.long
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("scenario", beside.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_launches_beside_each_other_for_long(scenario: Callable[[Model], None]) -> None:
    play(scenario, range(1_000, 1_400))


@pytest.mark.parametrize(("codec", "dim"), KINDS)
def test_rows_of_every_kind_are_whole(codec: str, dim: int) -> None:
    play(beside.look_beside_apply, range(2), codec, dim)
    play(beside.look_beside_inserts, range(2, 4), codec, dim)
    play(beside.pool_beside_apply, range(4, 6), codec, dim)


@pytest.mark.parametrize(("codec", "dim"), [("float32", 200), ("float16", 301), ("int8", 600)])
def test_rows_wider_than_a_warp_are_whole(codec: str, dim: int) -> None:
    play(beside.look_beside_apply, range(3), codec, dim)
    play(beside.pool_beside_apply, range(3), codec, dim)


@pytest.mark.parametrize(("codec", "dim"), KINDS)
def test_keys_at_random(codec: str, dim: int) -> None:
    many_keys(codec, dim, 300)


@pytest.mark.long
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize(("codec", "dim"), KINDS)
def test_many_keys_at_random(codec: str, dim: int) -> None:
    many_keys(codec, dim, 4_200)  # times the kinds: 100,800 for each kernel


def many_keys(codec: str, dim: int, count: int) -> None:
    """Each kernel is given `count` keys, in a cache that fills up to its last slot, beside a look-up."""
    seed = DIMS.index(dim) * len(CODECS) + CODECS[codec]
    world = World(Model(seed, accesses_max=500_000_000), Shape(-(-count // 56), dim, codec), seed)  # 32 slots for 56 keys
    twin = world.twin
    reading, writing = twin.stream(), twin.stream()
    keys = world.new_keys(count)
    checks = [world.insert(*world.batch(keys, 100), writing, score=1)]
    checks.append(world.apply(*world.batch(keys, 200), writing))
    looks = [world.lookup(world.rng.choice(keys, count), reading)]  # duplicates
    twin.synchronize()
    for check in (*checks, *looks):
        check()
    full = np.asarray(world.here.headers).view(layout.HEADER)["stamp"][:, 0].reshape(-1, layout.BUCKET_SLOTS).all(axis=1)
    assert full.mean() > 0.5, "the load was to be near 100 %"
    newcomers = world.new_keys(count // 4)
    stamps = np.where(np.arange(count) % 2, 300, 150).astype(np.uint64)
    checks = [
        world.erase(keys, stamps, writing),
        world.insert(*world.batch(newcomers, 400), writing, score=2),
        world.insert(*world.batch(keys[: count // 2], 500), writing, score=3),
    ]
    looks = [
        world.lookup(np.concatenate([keys, newcomers]), reading),
        world.pooled(world.rng.choice(keys, count), [*range(0, count, 2), count], reading),
        world.export(reading),
    ]
    twin.synchronize()
    for check in (*checks, *looks):
        check()
    world.check_memory()
