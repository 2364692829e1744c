"""What a simulated cluster is to be: nodes, links, load and faults, from a TOML file or drawn from a seed.

A scenario names every fault that happens in it, or says `swarm = true`: then each seed draws its own, each kind on or off and
as strong as chance has it (swarm testing: a run without a kind finds what a run with all of them hides).
"""

import random
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ekko.errors import ConfigError
from ekko.model import CODEC_DEFAULT, CODECS, TTL_S_MAX
from p2p.core import COLLECT_MS, EXPEL_AFTER_MS
from p2p.paper.sync import PRESETS
from p2p.replica import PARTITIONS_MAX
from sim_cluster.network import LinkOptions, NetworkOptions, pair_of

NODES_MAX: Final = 4_096
BYTES_PER_MS_OF_MBPS: Final = 125.0
# Wall clocks this far apart are within what a node takes from its peers (60 s), also after a few jumps.
CLOCK_MS_MAX: Final = 20_000
# And these are beyond it: what such a node writes is refused, and it may refuse what others write.
CLOCK_JUMP_MS_MAX: Final = 100_000
KILL_STEPS_MAX: Final = 60
# kind -> what happens to `node`, for as long as the event lasts
KINDS: Final = {
    "crash": "its process is killed, and started again with its memory",
    "kill": "the same, in the middle of what it does: after `amount` steps of it",
    "leave": "its process is told to end, says goodbye, and is started again with its memory",
    "lose": "its machine reboots: it starts again without its memory",
    "pause": "SIGSTOP, SIGCONT",
    "isolate": "nothing reaches it and nothing leaves it",
    "deaf": "nothing reaches it",
    "mute": "nothing leaves it",
    "one-way": "nothing passes from it to the node `other`, while it hears that one",
    "split": "nothing passes between its region and the others",
    "clock": "its wall clock is `amount_ms` ahead",
    "hold": "it is started again and holds other partitions from then on, which `amount` draws",
    "expel": "nothing passes from or to it, and at the end an operator expels it; by an odd `amount` it is started again then",
    "generation": "a model is begun or written at it, an alias switched, as `amount` draws; at the end one drops it",
    "away": "its process is killed and away for so long that the others expel it; it is started again with its memory",
    "restore": "its memory is lost, and it is started again with what a snapshot has that was begun `for_ms` before",
    "congested": "its region's links to other regions carry `amount` bytes a millisecond, each pair of nodes",
    "fence": "a model, which `amount` draws, is fenced at it, restored by whoever may, and lifted at the end by anybody; "
    "by an odd `amount` it is killed in the middle of something",
    "upgrade": "it has spoken protocol version 1 until now, is stopped, and started again in the newest one",
}
# Drawn behind the others, so that a seed's other faults are what they were before these kinds came.
LATER_KINDS: Final = ("expel", "upgrade", "generation", "restore", "away", "congested", "fence")
# Drawn only where a scenario names them: who says goodbye and comes back behind a fence with more than all others starts over.
ASKED_KINDS: Final = ("fence",)
# Members are given up as dead after some 10 s; nobody is expelled before.
EXPEL_MS_MIN: Final = 10_000
RESTORE_MS: Final = 15_000
# Bytes a millisecond of a congested pair of nodes; and for how long at least, so that a backlog builds up and drains.
CONGESTED: Final = (2, 5, 15)
CONGESTED_MS_MIN: Final = 4_000
# Nobody comes back from a longer absence than so in virtual time: elsewhere members are not expelled by themselves.
AWAY_MS_MAX: Final = 600_000
NETWORK: Final = "network"  # the kind that stands for loss, delays and the like
# A swarm draws so many faults of each kind in so long; a longer run has more.
COUNTS: Final = (0, 0, 1, 2, 4)
COUNTS_MS: Final = 20_000
SHORT_QUEUES: Final = 0.25
HOLD: Final = "hold"
# Batches of a burst, at most.
BURST_MAX: Final = 6
TIMES_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node."""

    name: str
    region: str
    role: str


@dataclass(frozen=True, slots=True)
class Workload:
    """What the training node publishes."""

    batches_per_s: float = 10.0
    rows: int = 20  # of a batch, at most
    keys: int = 500  # of a table; small ones are written more often
    deletes: float = 0.05  # fraction of batches that delete
    models: int = 1
    shards: int = 8
    codec: str = CODEC_DEFAULT
    partitions: int = 1  # of a model
    hold: str = "all"  # what serving nodes hold of them: "all", or "random": drawn from the seed
    bursts: float = 0.0  # fraction of batches that some others follow within milliseconds, so that they share messages
    room: float = 1.0  # some serving nodes have room for this fraction of the rows, and evict; 1: all have room for all
    ttl_s: int = 0  # how long rows of the table `user` live; 0: for ever

    @property
    def model_names(self) -> list[str]:
        """The models that the nodes carry."""
        return [f"model-{number + 1}" for number in range(self.models)]


@dataclass(frozen=True, slots=True)
class FaultEvent:
    """One fault of a node."""

    at_ms: int
    kind: str  # of KINDS
    node: str
    for_ms: int
    amount: int = 0  # milliseconds of a clock, steps before a kill
    other: str = ""  # the node at the other end

    def __str__(self) -> str:
        other, amount = f" to {self.other}" if self.other else "", f" by {self.amount}" if self.amount else ""
        return f"{self.at_ms / 1000:7.2f} s  {self.kind} {self.node}{other}{amount} for {self.for_ms / 1000:.2f} s"


@dataclass(frozen=True, slots=True)
class Faults:
    """Everything that goes wrong in one run."""

    network: NetworkOptions
    events: tuple[FaultEvent, ...] = ()
    message_bytes_max: int = 0  # batches and chunks are cut this small; 0: as in production
    short_queues: bool = False  # every bound is met all the time


@dataclass(frozen=True, slots=True)
class Scenario:
    """A cluster and what happens to it."""

    name: str
    nodes: tuple[NodePlan, ...]
    duration_ms: int = 20_000
    settle_ms: int = 90_000  # at most, from the end of all faults until all nodes are equal
    check_ms: int = 250
    workload: Workload = field(default_factory=Workload)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    events: tuple[FaultEvent, ...] = ()
    swarm: bool = False
    kinds: tuple[str, ...] = (*(kind for kind in KINDS if kind not in ASKED_KINDS), NETWORK)  # what a swarm draws from
    collect_ms: int = COLLECT_MS  # how often nodes ask what may be forgotten
    expel_after_ms: int = EXPEL_AFTER_MS
    sync: str = "push"  # by which protocol replicas are kept equal: one of `p2p.paper.sync.PRESETS`

    @property
    def trainer(self) -> str:
        """The node that publishes; of several, the one that they all begin with."""
        return self.trainers[0]

    @property
    def trainers(self) -> list[str]:
        """The nodes that may publish."""
        return [node.name for node in self.nodes if node.role == "train"]

    def limited(self, seed: int) -> list[str]:
        """Which serving nodes have room for some of the rows only, under this seed; there is one at least."""
        serving = [node.name for node in self.nodes if node.role != "train"]
        if self.workload.room == 1 or not serving:
            return []
        rng = random.Random(f"limited of {seed}")
        return sorted(rng.sample(serving, rng.randint(1, len(serving))))

    def holds(self, seed: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Which partitions of each model each node holds under this seed: node -> model -> partitions.

        Training nodes hold all, since they write all; each partition of the others has at least one holder among them.
        """
        rng, everything = random.Random(f"holds of {seed}"), tuple(range(self.workload.partitions))
        serving = [node.name for node in self.nodes if node.role != "train"]
        drawn = {node.name: dict.fromkeys(self.workload.model_names, everything) for node in self.nodes}
        for model in self.workload.model_names if self.workload.hold == "random" else ():
            held = {name: draw_hold(len(everything), rng) for name in serving}
            for partition in everything:
                if serving and not any(partition in one for one in held.values()):
                    held[rng.choice(serving)].add(partition)
            for name in serving:
                drawn[name][model] = tuple(sorted(held[name]))
        return drawn

    def faults(self, seed: int) -> Faults:
        """What goes wrong under this seed."""
        return draw_faults(self, seed) if self.swarm else Faults(self.network, self.events)


def draw_hold(partitions: int, rng: random.Random) -> set[int]:
    """Some partitions, at least one."""
    return {rng.randrange(partitions), *(partition for partition in range(partitions) if rng.random() < 0.4)}


def draw_faults(scenario: Scenario, seed: int) -> Faults:
    """Each kind of fault on or off, and as strong as chance has it."""
    rng = random.Random(f"faults of {seed}")

    network = _draw_network(scenario, rng) if NETWORK in scenario.kinds else scenario.network
    rounds = max(1, round(scenario.duration_ms / COUNTS_MS))

    def draw(kinds: Iterable[str]) -> list[FaultEvent]:
        return [
            event
            for kind in kinds
            if kind in scenario.kinds and (kind != HOLD or scenario.workload.hold == "random")
            if kind != "away" or scenario.expel_after_ms <= AWAY_MS_MAX
            for _ in range(sum(rng.choice(COUNTS) for _ in range(rounds)))
            for event in _draw_event(scenario, kind, rng)
        ]

    events = draw(kind for kind in KINDS if kind not in LATER_KINDS)
    cut = rng.choice([0, 0, 300, 1_000]) if NETWORK in scenario.kinds else 0
    short_queues = NETWORK in scenario.kinds and rng.random() < SHORT_QUEUES
    return Faults(network, _in_order([*events, *draw(LATER_KINDS)]), cut, short_queues)


def _draw_network(scenario: Scenario, rng: random.Random) -> NetworkOptions:
    def some(probability: float, strongest: float) -> float:
        return rng.uniform(0, strongest) if rng.random() < probability else 0.0

    base = scenario.network
    return NetworkOptions(
        delay_ms_min=base.delay_ms_min,
        delay_ms_max=base.delay_ms_max + int(some(0.5, 40)),
        region_delay_ms=base.region_delay_ms + int(some(0.5, 150)),
        loss_probability=some(0.5, 0.25),
        repeat_probability=some(0.5, 0.25),
        reorder_probability=some(0.5, 0.5),
        tail_probability=some(0.4, 0.1),
        tail_ms=rng.uniform(50, 1_500),
        corrupt_probability=some(0.4, 0.05),
        afterlife_probability=rng.choice([0.0, 0.5, 1.0]),
        rate_bytes_per_ms=rng.choice([0.0, 0.0, 1_000.0, 200.0, 60.0]),
        links={**base.links, **_draw_links(scenario, rng)},
        card_bytes_per_ms=rng.choice([0.0, 0.0, 0.0, 400.0, 100.0]),
    )


def _draw_links(scenario: Scenario, rng: random.Random) -> dict[str, LinkOptions]:
    """Some pairs of regions have a link of their own: longer, narrower or worse than the others."""
    regions = sorted({node.region for node in scenario.nodes})
    pairs = [pair_of(one, other) for one in regions for other in regions if one < other and rng.random() < 0.3]
    rates = [0.0, 500.0, 100.0, 40.0]
    return {pair: LinkOptions(rng.randrange(250), rng.choice(rates), rng.choice([0.0, 0.0, 0.1, 0.4])) for pair in pairs}


def _draw_event(scenario: Scenario, kind: str, rng: random.Random) -> list[FaultEvent]:
    """One fault of this kind; one in six flaps: it comes again and again, a moment after it ended."""
    node, other = (one.name for one in rng.sample(scenario.nodes, 2))
    amount = 0
    if kind == "clock":
        most = CLOCK_MS_MAX if rng.random() < 0.7 else CLOCK_JUMP_MS_MAX
        amount = rng.randint(-most, most)
    elif kind == "kill":
        amount = rng.randrange(KILL_STEPS_MAX)
    elif kind in (HOLD, "expel", "generation", "fence"):
        amount = rng.randrange(1 << 16)
    at_ms, for_ms, times, every_ms = rng.randrange(scenario.duration_ms), int(rng.expovariate(1 / 3_000)) + 1, 1, 0
    if rng.random() < 1 / 6:
        for_ms, times = rng.randint(20, 1_500), rng.randint(3, 10)
        every_ms = for_ms + rng.randint(20, 1_500)
    if kind == "congested":  # a few steps' worth a second, up to several times what is written
        amount, for_ms, times = rng.choice(CONGESTED), for_ms + CONGESTED_MS_MIN, 1
    if kind == "expel":
        at_ms, for_ms, times = at_ms // 2, for_ms + EXPEL_MS_MIN, 1
    if kind == "restore":  # long enough that what is in the snapshot is deleted, and forgotten, meanwhile
        for_ms, times = for_ms + rng.randrange(RESTORE_MS), 1
    if kind == "away":
        at_ms, for_ms, times = at_ms // 2, for_ms + EXPEL_MS_MIN + scenario.expel_after_ms, 1
    return _repeated(FaultEvent(at_ms, kind, node, for_ms, amount, other if kind == "one-way" else ""), times, every_ms)


def _repeated(event: FaultEvent, times: int, every_ms: int) -> list[FaultEvent]:
    return [replace(event, at_ms=event.at_ms + number * every_ms) for number in range(times)]


def _in_order(events: Iterable[FaultEvent]) -> tuple[FaultEvent, ...]:
    return tuple(sorted(events, key=lambda event: (event.at_ms, event.kind, event.node, event.other)))


# --- from a file ------------------------------------------------------------------------------------------------------------


def load_scenario(path: Path) -> Scenario:
    """Read a scenario.

    Raises:
        ConfigError: the file cannot be read, or something in it is not understood; names it.
    """
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"scenario {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"scenario {path} is not TOML: {error}") from None
    try:
        return _scenario(document, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _scenario(document: dict[str, Any], stem: str) -> Scenario:
    top = _Section("scenario", document.pop("scenario", {}))
    nodes = _nodes(document.pop("regions", {}))
    network = _network(_Section("network", document.pop("network", {})), document.pop("links", {}), {n.region for n in nodes})
    load = _Section("workload", document.pop("workload", {}))
    workload = Workload(
        load.number("batches_per_s", 10.0, 0.1, 10_000),
        load.whole("rows", 20, 1, 100_000),
        load.whole("keys", 500, 1, 10_000_000),
        load.number("deletes", 0.05, 0, 1),
        load.whole("models", 1, 1, 64),
        load.whole("shards", 8, 1, 65_536),
        str(load.take("codec", CODEC_DEFAULT)),
        load.whole("partitions", 1, 1, PARTITIONS_MAX),
        str(load.take("hold", "all")),
        load.number("bursts", 0, 0, 1),
        room=load.number("room", 1, 0, 1),
        ttl_s=load.whole("ttl_s", 0, 0, TTL_S_MAX),
    )
    if workload.codec not in CODECS:
        raise ConfigError(f"[workload].codec is {workload.codec!r}: expected one of {', '.join(CODECS)}")
    load.done()
    if workload.partitions > workload.shards:
        raise ConfigError(f"workload.partitions is {workload.partitions}, more than its {workload.shards} shards")
    if workload.hold not in ("all", "random"):
        raise ConfigError(f"workload.hold is {workload.hold!r}: expected 'all' or 'random'")
    duration_ms = int(1000 * top.number("duration_s", 20.0, 0.1, 86_400))
    events = [event for item in document.pop("faults", []) for event in _events(item, {node.name for node in nodes})]
    scenario = Scenario(
        str(top.take("name", stem)),
        nodes,
        duration_ms,
        int(1000 * top.number("settle_s", 90.0, 1, 86_400)),
        int(1000 * top.number("check_s", 0.25, 0.01, 3_600)),
        workload,
        network,
        _in_order(events),
        bool(top.take("swarm", False)),
        _kinds(top.take("kinds", [*(kind for kind in KINDS if kind not in ASKED_KINDS), NETWORK])),
        int(1000 * top.number("collect_s", COLLECT_MS / 1000, 0, 86_400)),
        int(1000 * top.number("expel_after_s", EXPEL_AFTER_MS / 1000, 0, 864_000)),
        sync_named(top.take("sync", "push")),
    )
    top.done()
    if document:
        raise ConfigError(
            f"[{next(iter(document))}] is not understood: use scenario, regions, network, links, workload, faults"
        )
    if scenario.swarm and scenario.events:
        raise ConfigError("swarm = true draws its own faults: remove [[faults]], or swarm")
    return scenario


def sync_named(name: Any) -> str:
    """The name of a preset.

    Raises:
        ConfigError: there is none of this name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"sync {name!r} is not one of {', '.join(PRESETS)}")
    return name


def _nodes(regions: Mapping[str, Any]) -> tuple[NodePlan, ...]:
    nodes: list[NodePlan] = []
    for region, counts in regions.items():
        section = _Section(f"regions.{region}", counts)
        for role in ("train", "serve"):
            count = section.whole(role, 0, 0, NODES_MAX)
            nodes += [NodePlan(f"{region}-{role[0]}{number + 1}", region, role) for number in range(count)]
        section.done()
    if not any(node.role == "train" for node in nodes):
        raise ConfigError("[regions] has no node with role train, so nobody would publish: home = { train = 1 }")
    if len(nodes) < 2:
        raise ConfigError("[regions] has one node, and nobody to replicate to: eu = { serve = 2 }")
    if len(nodes) > NODES_MAX:
        raise ConfigError(f"{len(nodes)} nodes, limit {NODES_MAX}")
    return tuple(sorted(nodes, key=lambda node: node.role != "train"))


def _network(section: "_Section", links: Mapping[str, Any], regions: set[str]) -> NetworkOptions:
    network = NetworkOptions(
        delay_ms_min=section.whole("delay_ms_min", 1, 0, 60_000),
        delay_ms_max=section.whole("delay_ms_max", 5, 0, 60_000),
        region_delay_ms=section.whole("region_delay_ms", 0, 0, 60_000),
        loss_probability=section.number("loss", 0.0, 0, 1),
        repeat_probability=section.number("repeat", 0.0, 0, 1),
        reorder_probability=section.number("reorder", 0.0, 0, 1),
        tail_probability=section.number("tail", 0.0, 0, 1),
        tail_ms=section.number("tail_ms", 500.0, 0, 60_000),
        corrupt_probability=section.number("corrupt", 0.0, 0, 1),
        afterlife_probability=section.number("afterlife", 0.0, 0, 1),
        rate_bytes_per_ms=BYTES_PER_MS_OF_MBPS * section.number("rate_mbps", 0.0, 0, 1e6),
        links={_pair(name, regions): _link(name, values) for name, values in links.items()},
    )
    section.done()
    if network.delay_ms_max < network.delay_ms_min:
        raise ConfigError("[network].delay_ms_max is below delay_ms_min")
    return network


def _pair(name: str, regions: set[str]) -> str:
    ends = name.split("/")
    if len(ends) != 2 or not set(ends) <= regions:
        raise ConfigError(f'[links] {name!r} is no pair of regions: use "eu/us", of {", ".join(sorted(regions))}')
    return pair_of(*ends)


def _link(name: str, values: Any) -> LinkOptions:
    section = _Section(f'links."{name}"', values)
    rate = BYTES_PER_MS_OF_MBPS * section.number("rate_mbps", 0.0, 0, 1e6)
    link = LinkOptions(section.whole("delay_ms", 0, 0, 60_000), rate, section.number("loss", 0.0, 0, 1))
    section.done()
    return link


def _kinds(value: Any) -> tuple[str, ...]:
    known = (*KINDS, NETWORK)
    if not isinstance(value, list) or not value or any(kind not in known for kind in value):
        raise ConfigError(f"scenario.kinds is {value!r}: expected some of {', '.join(known)}")
    return tuple(value)


def _events(item: Any, nodes: set[str]) -> list[FaultEvent]:
    section = _Section("[faults]", item)
    kind, node, other = section.take("kind", ""), section.take("node", ""), section.take("other", "")
    if kind not in KINDS:
        raise ConfigError(f"[[faults]] kind {kind!r} is not one of {', '.join(KINDS)}")
    for name in (node, other) if other or kind == "one-way" else (node,):
        if name not in nodes:
            raise ConfigError(f"[[faults]] node {name!r} does not exist: nodes are {', '.join(sorted(nodes)[:12])}")
    if other and kind != "one-way":
        raise ConfigError(f"[[faults]] {kind} of {node!r} has no other node: remove `other`, or use kind one-way")
    amount = "amount" if kind in ("kill", HOLD, "expel", "generation", "congested", "fence") else "amount_ms"
    event = FaultEvent(
        int(1000 * section.number("at_s", 0.0, 0, 86_400)),
        kind,
        node,
        max(1, int(1000 * section.number("for_s", 1.0, 0, 86_400))),
        section.whole(amount, 0, -86_400_000, 86_400_000),
        other,
    )
    times, every_ms = section.whole("times", 1, 1, TIMES_MAX), int(1000 * section.number("every_s", 0.0, 0, 86_400))
    section.done()
    if times > 1 and every_ms <= event.for_ms:
        raise ConfigError(f"[[faults]] {kind} of {node!r} comes {times} times: every_s must be longer than for_s")
    return _repeated(event, times, every_ms)


class _Section:
    """One table of the file; what is not taken is an error, so that a misspelt setting is not ignored."""

    def __init__(self, name: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: expected a table, got {values!r}"[:200])
        self._name = name
        self._values = dict(values)

    def take(self, key: str, default: Any) -> Any:
        return self._values.pop(key, default)

    def number(self, key: str, default: float, least: float, most: float) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ConfigError(f"{self._name}.{key} is {value!r}: expected a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, key: str, default: int, least: int, most: int) -> int:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{self._name}.{key} is {value!r}: expected a whole number from {least} to {most}")
        return value

    def done(self) -> None:
        if self._values:
            raise ConfigError(f"{self._name}.{next(iter(self._values))} is not understood")
