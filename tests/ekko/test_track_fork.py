"""A process that is forked off from one that tracks: its copy of the tracker neither hangs nor publishes."""

import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch

import ekko.torch
from ekko.errors import ModelError
from tests.ekko.test_torch import TABLES, Recorder, Toy, adagrad, train
from tests.ekko.test_track_background import WAIT_S, Slow, until

CHILD_S = 60  # then a child that hangs is ended by a signal


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of torch do not survive a fork
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud: torch warns when Adagrad meets sparse rows
    yield
    torch.set_num_threads(threads)


def in_child(work: Callable[[], None]) -> int:
    """How a child ended that did some work; nothing else of the test runs in it."""
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_S)
        failed = 1
        try:
            work()
            failed = 0
        except BaseException:  # noqa: BLE001 - nothing may come out of here into the test that goes on in the parent
            traceback.print_exc()
        os._exit(failed)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks where there are threads
@pytest.mark.parametrize("background", [True, False])
def test_a_child_steps_and_publishes_nothing(background: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    with ekko.torch.track(model, optimizer, publisher, TABLES, dense_every=1, background=background) as tracker:
        train(model, optimizer, [3], [7])
        tracker.flush()
        published = len(publisher.steps)

        def child() -> None:
            with caplog.at_level(logging.WARNING):
                for number in range(3):
                    train(model, optimizer, [number], [7])
            [told] = [record.getMessage() for record in caplog.records]
            assert "publishes nothing of what it trains: call ekko.torch.track() in it" in told
            with pytest.raises(ModelError, match="forked from one that tracks a model"):
                tracker.flush()
            tracker.remove()
            assert len(publisher.steps) == published
            other = Recorder({"users": 4, "items": 4})
            with ekko.torch.track(model, optimizer, other, TABLES, background=background) as again:
                train(model, optimizer, [5], [7])
                again.flush()
                assert set(other.steps[0].rows["users"]) == {5}

        # Its thread holds what it copies with, and what it sends with, at the moment of the fork.
        with tracker._sender.sending, tracker._gate.between_steps():
            assert in_child(child) == 0
        train(model, optimizer, [4], [8])
        tracker.flush()
        assert set(publisher.steps[-1].rows["users"]) == {4}, "the parent goes on"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_may_use_a_table_that_grows() -> None:
    model, publisher = Toy(), Slow()
    optimizer = adagrad(model)
    keys = ekko.torch.KeyMap(model.user, optimizer)
    with ekko.torch.track(model, optimizer, publisher, TABLES, keys={"user": keys}) as tracker:
        rows = keys.rows(torch.tensor([70, 71]))
        publisher.goes_on.clear()
        train(model, optimizer, rows.tolist(), [7, 8])
        assert publisher.entered.wait(WAIT_S)

        def child() -> None:
            keys.free(torch.tensor([70]))
            assert len(keys.rows(torch.tensor([72, 73, 74]))) == 3

        with tracker._gate.between_steps(), tracker._tables["users"]._lock:
            assert in_child(child) == 0
        publisher.goes_on.set()
        until(lambda: bool(publisher.steps))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("removed", [True, False])
def test_a_child_is_told_nothing_untrue(removed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Where tracking had ended before the fork, or begins anew in the child before its first step."""
    model = Toy()
    optimizer = adagrad(model)
    tracker = ekko.torch.track(model, optimizer, Slow(), TABLES)
    if removed:
        tracker.remove()

    def child() -> None:
        with caplog.at_level(logging.WARNING):
            if removed:
                train(model, optimizer, [5], [7])
            else:
                other = Recorder({"users": 4, "items": 4})
                with ekko.torch.track(model, optimizer, other, TABLES, background=False):
                    train(model, optimizer, [5], [7])
                assert len(other.steps) == 1
        assert not caplog.records

    assert in_child(child) == 0
    tracker.remove()
