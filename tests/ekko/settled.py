"""Waiting for what a step on real nodes leads to, where a test would otherwise hope that some time is enough."""

import time

import ekko
from ekko.rollback.moments import show_moment
from sim_cluster.processes import NodeProcess, wait_until

WITHIN_S = 60.0


def everywhere(publisher: ekko.Publisher, stamp: int) -> int:
    """Return the step's stamp once all nodes that hold the model have it, those that were silent for a while included."""
    wait_until(lambda: not publisher.wait(stamp, "all", WITHIN_S), "no node is silent", WITHIN_S)
    return stamp


def known_moment(witness: NodeProcess, *models: str) -> str:
    """A moment, for `--to`, of which the witness can tell how these models were: behind all that was written, before the rest.

    Of witnesses `everywhere` says nothing. What comes by other ways than in its steps, as after a stall, hides older versions,
    so that of some moments nothing is known; but of none before one that is known already. So others may write meanwhile.
    """
    begin_ms = _now_ms()

    def is_known() -> bool:
        older = witness.status()["delayed"]["models"]
        return all(older[model]["known_until_ms"] >= begin_ms for model in models)

    wait_until(is_known, f"{witness.id} has all of {', '.join(models)}", WITHIN_S)
    moment_ms = _now_ms()
    wait_until(lambda: _now_ms() > moment_ms, "the moment is over", WITHIN_S)
    return show_moment(moment_ms)


def is_lifted(node: NodeProcess, model: str) -> bool:
    """Whether a node has heard that the last fence of a model is lifted: until then it refuses the model's publishers."""
    fence = node.status()["models"][model]["fence"]
    return fence is None or fence["stage"] == "lifted"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
