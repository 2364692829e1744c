"""Waiting in tests for as long as it takes on a machine that is busy, or stands still for seconds."""

import ekko
from sim_cluster.processes import wait_until

PATIENCE_S = 60.0


def everywhere(publisher: ekko.Publisher, stamp: int) -> None:
    """Return when a step is visible on all nodes, also on those that seemed to be silent, for which `wait` does not wait.

    Raises:
        TimeoutError: it is not within `PATIENCE_S`.
    """
    wait_until(lambda: publisher.wait(stamp, "all", timeout=PATIENCE_S) == (), "the step to be on all nodes", PATIENCE_S)
