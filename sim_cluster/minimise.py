"""What to do about a seed that fails: find fewer faults under which it still does."""

from dataclasses import fields, replace
from typing import Final

from sim_cluster.network import NetworkOptions
from sim_cluster.scenario import Faults, Scenario
from sim_cluster.swarm import run_virtual

MINIMISE_RUNS_MAX: Final = 60
_PLAIN: Final = NetworkOptions()


def minimise(scenario: Scenario, seed: int, faults: Faults, runs_max: int = MINIMISE_RUNS_MAX) -> tuple[Faults, int]:
    """Fewer faults under which the seed still fails: events are removed by halves, then quarters and so on (delta debugging),
    then each fault of the network is switched off.

    Returns:
        The faults that are left, and how many runs it took.
    """
    runs = 0

    def fails(candidate: Faults) -> bool:
        nonlocal runs
        runs += 1
        return bool(run_virtual(scenario, seed, candidate).problem)

    size = max(1, len(faults.events) // 2)
    while faults.events and runs < runs_max:
        removed = False
        begin = 0
        while begin < len(faults.events) and runs < runs_max:
            rest = faults.events[:begin] + faults.events[begin + size :]
            if fails(replace(faults, events=rest)):
                faults, removed = replace(faults, events=rest), True
            else:
                begin += size
        if size == 1 and not removed:
            break
        size = max(1, size // 2)
    for name in [one.name for one in fields(NetworkOptions) if one.name != "links"]:
        plain = getattr(_PLAIN, name)
        if runs < runs_max and getattr(faults.network, name) != plain:
            candidate = replace(faults, network=replace(faults.network, **{name: plain}))
            faults = candidate if fails(candidate) else faults
    return faults, runs
