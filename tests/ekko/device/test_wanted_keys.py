"""What readers want on the device: the ring, and what bad writers can do to it; the feed; the control file."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ekko.device.control import BYTES, NAME, DeviceControl, retire
from ekko.device.feed import Feed
from ekko.device.wanted import CAPACITY, POSTED_MAX, WantedKeys, WantedPost
from ekko.store import layout
from ekko.store.access import Access
from ekko.store.kernels import wanted as kernels
from ekko.store.memory import Mapping, TmpfsMemory

U64 = np.uint64


@pytest.fixture
def wanted(tmp_path: Path) -> WantedKeys:
    return WantedKeys(TmpfsMemory(tmp_path, "ekko-test"), 1, 2)


def post_of(wanted: WantedKeys) -> WantedPost:
    post = WantedPost.open(wanted.path)
    assert post is not None
    return post


def test_wishes_come_in_order_and_once(wanted: WantedKeys) -> None:
    post, other = post_of(wanted), post_of(wanted)
    assert wanted.take().tolist() == []
    post.post(np.array([5, 7, 5], U64))
    other.post(np.array([2**64 - 1, 0], U64))
    assert wanted.take().tolist() == [5, 7, 5, 2**64 - 1, 0]
    assert wanted.take().tolist() == []
    post.post(np.arange(CAPACITY, dtype=U64))
    assert wanted.take().tolist() == list(range(POSTED_MAX))
    assert wanted.lost == 0


def test_threads_lose_none_to_each_other(wanted: WantedKeys) -> None:
    posts = [post_of(wanted) for _ in range(4)]

    def run(number: int) -> None:
        for step in range(100):
            posts[number].post(np.arange(10, dtype=U64) + U64(number * 1_000 + 10 * step))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wanted.take().tolist()) == list(range(4_000))


def test_wishes_that_were_overwritten_are_counted(wanted: WantedKeys) -> None:
    post = post_of(wanted)
    for begin in range(0, 2 * CAPACITY + POSTED_MAX, POSTED_MAX):
        post.post(np.arange(begin, begin + POSTED_MAX, dtype=U64))
    assert wanted.take().tolist() == list(range(CAPACITY + POSTED_MAX, 2 * CAPACITY + POSTED_MAX))
    assert wanted.lost == CAPACITY + POSTED_MAX


def test_a_wish_whose_writer_died_in_it_is_waited_for_once(wanted: WantedKeys) -> None:
    post = post_of(wanted)
    post.post(np.array([1], U64))
    head = post._mapping.words(kernels.HEAD)
    head[...] += U64(1)  # it took a number, and wrote no key
    post.post(np.array([3], U64))
    assert wanted.take().tolist() == [1]
    assert wanted.take().tolist() == [3]
    assert wanted.lost == 1


def test_a_bad_writer_hurts_nobody(wanted: WantedKeys) -> None:
    post = post_of(wanted)
    post._mapping.words(kernels.HEAD)[...] = U64(2**63)
    assert wanted.take().tolist() == []
    assert wanted.lost == 1
    post.post(np.array([1], U64))
    assert wanted.take().tolist() == [1]
    del post
    os.truncate(wanted.path, 100)
    assert wanted.take().tolist() == []
    wanted.mend()
    post_of(wanted).post(np.array([4, 5], U64))
    assert wanted.take().tolist() == [4, 5]


def test_who_may_not_write_wants_nothing(tmp_path: Path) -> None:
    assert WantedPost.open(tmp_path / "missing") is None
    (tmp_path / "short").write_bytes(b"\0" * 64)
    assert WantedPost.open(tmp_path / "short") is None


def test_the_feed_says_how_far_it_is_before_what_there_is() -> None:
    header = Mapping.anonymous(layout.PAGE_BYTES)
    epoch = header.words(layout.MODEL.offset("batch_epoch"))
    wake = threading.Event()
    feed = Feed(header, wake, keys_max=8)
    feed.follow([1])
    feed.note(2, np.array([1], U64))
    assert not wake.is_set()
    assert feed.drain().empty
    epoch[...] = 5  # a batch is being applied
    keys = np.array([1, 2], U64)
    feed.note(1, keys)
    keys[...] = 9  # the caller's
    feed.note_gone(1, np.array([3], U64))
    assert wake.is_set()
    assert feed.waiting == 3
    drained = feed.drain()
    assert drained.until == 4, "that batch may have more rows"
    assert [part.tolist() for part in drained.changed[1]] == [[1, 2]]
    assert [part.tolist() for part in drained.gone[1]] == [[3]]
    epoch[...] = 6
    feed.note(1, np.arange(6, dtype=U64))
    feed.note(1, np.arange(6, dtype=U64))
    feed.note(1, np.arange(1, dtype=U64))
    drained = feed.drain()
    assert drained.until == 6
    assert drained.all_of == {1}
    assert not drained.changed
    assert (feed.waiting, feed.overflows) == (0, 1)


def test_the_control_file_outlives_its_daemon(tmp_path: Path) -> None:
    assert DeviceControl.open(tmp_path) is None
    retire(tmp_path)  # of a node that never had a device
    control = DeviceControl.begin(tmp_path, Access(0o640))
    reader = DeviceControl.open(tmp_path)
    assert reader is not None
    assert reader.generation == control.generation == 1
    control.set_applied(255, 18)
    assert reader.applied(255) == 18
    again = DeviceControl.begin(tmp_path, Access(0o600))
    assert reader.generation == 2
    again.renew()
    retire(tmp_path)
    assert reader.settled_generation() == 4
    assert (tmp_path / NAME).stat().st_size == BYTES
    (tmp_path / NAME).write_bytes(b"")
    assert DeviceControl.open(tmp_path) is None
