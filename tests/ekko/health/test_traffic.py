"""Which requests are whose: by a hash that is the same everywhere, and by shares that readers see in shared memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ekko.errors import ModelError
from ekko.health.traffic import BASELINE, ONLINE, Traffic, arms_of, hashes_of
from ekko.model import ModelSpec, TableSpec
from ekko.serve.reader import Reader
from ekko.store import Store
from ekko.store.kernels.index import shards_of

FIXED = ["59422ff41328bce8", "c7eabe58f342ed31", "4d3d9fbd0c91eabf"]
FIXED_TEXT = "9fc920a866d6eeeb"
IDS = np.arange(50_000, dtype=np.uint64)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "node"
    Store.open(tmp_path / "node").destroy()


def online(traffic: Traffic, model: str = "ctr") -> set[int]:
    return set(np.flatnonzero(arms_of(model, IDS, *traffic.bounds) == ONLINE).tolist())


def test_the_hash_is_as_documented_and_never_changes() -> None:
    numbers = hashes_of("ctr", np.array([0, 1, 2**64 - 1], np.uint64))
    assert [f"{number:016x}" for number in numbers.tolist()] == FIXED
    assert f"{int(hashes_of('ctr', ['request-1'])[0]):016x}" == FIXED_TEXT
    assert hashes_of("ctr", [b"request-1"]).tolist() == hashes_of("ctr", ["request-1"]).tolist()
    # The finaliser is the one that shards are made with.
    shards = np.empty(len(IDS), np.int64)
    salted = IDS ^ np.uint64(xxhash.xxh64_intdigest(b"ctr"))
    shards_of(salted, 64, shards)
    assert (hashes_of("ctr", IDS) % np.uint64(64)).tolist() == shards.tolist()


def test_shares_are_what_they_say_and_nested() -> None:
    for share in (0.001, 0.01, 0.3):
        arms = arms_of("ctr", IDS, *Traffic(share).bounds)
        assert abs(float((arms == BASELINE).mean()) - share) < 4 * (share / len(IDS)) ** 0.5
    steps = [Traffic(0.01, serving) for serving in (0.0, 0.01, 0.5, 1.0)]
    groups = [online(one) for one in steps]
    assert groups[0] == set()
    assert groups[0] < groups[1] < groups[2] < groups[3] == online(Traffic(0.01))
    assert online(Traffic()) == set(IDS.tolist())
    assert online(Traffic(1.0)) == set()
    assert online(Traffic(0.5)) != online(Traffic(0.5), "cvr"), "models divide requests independently"
    for traffic in (Traffic(), Traffic(0.01), Traffic(0.01, 0.25)):
        back = Traffic.of_bounds(*traffic.bounds)
        assert (back.baseline, back.serving) == pytest.approx((traffic.baseline, traffic.serving), abs=1e-8)


def test_a_reader_sees_shares_change_and_they_outlive_the_daemon(run_dir: Path) -> None:
    store = Store.open(run_dir)
    model = store.add_model(ModelSpec("ctr", 4, {"item": TableSpec("item", 2)}))
    with Reader("ctr", run_dir) as reader:
        assert not reader.arm(IDS).any()
        assert reader.traffic() == Traffic()
        model.set_traffic(Traffic(0.2))
        arms = reader.arm(IDS)
        assert 0.18 < arms.mean() < 0.22
        assert arms.dtype == np.uint8
        assert reader.arm(IDS.reshape(2, -1)).tolist() == arms.reshape(2, -1).tolist()
        assert int(reader.arm(7)) == arms[7]
        model.set_traffic(Traffic(0.2, 0.0))
        assert reader.arm(IDS).all(), "a rollback takes all of them"
        model.set_traffic(Traffic(0.2))
        assert reader.arm(IDS).tolist() == arms.tolist()
        store.close()
        again = Store.open(run_dir)
        assert again.models["ctr"].traffic.baseline == pytest.approx(0.2)
        assert reader.arm(IDS).tolist() == arms.tolist()
        again.close()


@pytest.mark.parametrize("ids", [[-1], [1.5], [{"a"}, 3], [None]])
def test_what_is_no_request_id_is_refused(ids: list[object]) -> None:
    with pytest.raises(ModelError, match="request ids are"):
        hashes_of("ctr", ids)  # type: ignore[arg-type]


def test_shares_are_shares() -> None:
    with pytest.raises(ModelError, match="from 0 to 1"):
        Traffic(1.5)
