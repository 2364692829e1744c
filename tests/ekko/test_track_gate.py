"""Steps of a trainer and copies of its state are apart, though a step that meets no copy takes no lock."""

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ekko.torch.sending import Gate

WAIT_S = 60.0
STEPS = 500


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _overlaps(gate: Gate) -> tuple[int, int]:
    """Of copies made while steps are made: how many there were, and how many saw a step under way, or one begin."""
    begun = 0
    inside = False
    over = threading.Event()
    copies = torn = 0

    def copy() -> None:
        nonlocal copies, torn
        while not over.is_set() or not copies:
            with gate.between_steps():
                seen = begun
                torn += inside
                for _ in range(20):
                    torn += inside or begun != seen
                copies += 1
            while begun == seen and not over.is_set():  # locks are not fair: let the other one have its turn
                time.sleep(0)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        for _ in range(STEPS):
            gate.enter()
            inside = True
            begun += 1
            for _ in range(20):
                pass
            inside = False
            gate.leave()
    finally:
        over.set()
        thread.join(WAIT_S)
    assert not thread.is_alive()
    return copies, torn


@pytest.mark.usefixtures("switching")
def test_no_copy_sees_a_step() -> None:
    copies, torn = _overlaps(Gate())
    assert copies
    assert not torn


class NotLooking(Gate):
    """Steps do not look whether somebody copies."""

    def enter(self) -> bool:
        self._inside = True
        return True


@pytest.mark.usefixtures("switching")
def test_planted_bug_steps_that_do_not_look_are_seen() -> None:
    """Copies there are in any case; one that lasts until a step has been made sees that."""
    gate = NotLooking()
    order: list[str] = []
    stepped = threading.Event()

    def step() -> None:
        gate.enter()
        order.append("step")
        gate.leave()
        stepped.set()

    with gate.between_steps():
        thread = threading.Thread(target=step)
        thread.start()
        assert stepped.wait(WAIT_S)
        order.append("copy")
    thread.join(WAIT_S)
    assert order == ["step", "copy"]


def test_a_step_waits_for_a_copy_and_a_copy_for_the_end_of_a_step() -> None:
    gate = Gate()
    order: list[str] = []

    def copy() -> None:
        with gate.between_steps():
            order.append("copy")

    assert gate.enter()
    assert not gate.enter(), "it had begun"
    copier = threading.Thread(target=copy)
    copier.start()
    while not gate._wanted:
        pass
    order.append("end of a step")
    gate.leave()
    copier.join(WAIT_S)

    def step() -> None:
        gate.enter()
        order.append("step")
        gate.leave()

    with gate.between_steps():
        trainer = threading.Thread(target=step)
        trainer.start()
        while not gate._left.is_set():  # it looked, and waits
            pass
        order.append("end of a copy")
    trainer.join(WAIT_S)
    assert order == ["end of a step", "copy", "end of a copy", "step"]
    assert gate.waited_s > 0
    gate.leave()  # none is under way: nothing to end
    with gate.between_steps():
        pass
