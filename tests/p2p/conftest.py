"""Blocking calls made from the event loop by our own code are errors here."""

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Raise `BlockingError` where `p2p` would make the loop wait for the network, a file or a clock."""
    with blockbuster_ctx(["p2p"]) as blocking:
        # Once a process, for the first frame that is not copied, pyzmq waits for a thread of its own to begin.
        blocking.functions["threading.Lock.acquire"].can_block_in("zmq/utils/garbage.py", {"start"})
        yield
