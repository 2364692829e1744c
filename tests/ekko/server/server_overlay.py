"""A model of the overlay as parameter servers see it: what nodes hold, who has it, what a crash or an expulsion loses.

Rows are what a test can read: the value of a key is the tuple of all pushes that were applied to it. Steps travel in a part for
each partition, which arrives whole, late or never; what never arrived is brought by pairs of nodes that compare what they hold.
Expulsion is as in the overlay: each node stops to listen to the life when it hears of it; when all did, what is left of it is
laid together, and only then the life is gone. A node that comes back and finds itself expelled, or somebody else, starts over.
"""

import random
from dataclasses import dataclass, field

from ekko.train.server import events as e

Place = tuple[int, object]  # partition, and a key or a worker's mark
Life = tuple[str, int]  # node, boot


@dataclass(frozen=True, slots=True)
class Cell:
    """One version of a row, or of a mark."""

    stamp: int
    value: object
    writer: Life


@dataclass
class Node:
    """A training node of the overlay; `memory` survives a crash unless the machine's does not."""

    name: str
    number: int
    boot: int = 0
    up: bool = False
    memory: dict[Place, Cell] = field(default_factory=dict)
    empty: bool = False  # it has lost its memory, and has not joined again
    memory_life: int = 0  # changes when what was in memory is lost
    clock: int = 0
    frozen: dict[Life, None] = field(default_factory=dict)  # lives that it does not listen to any more
    lives: dict[str, e.NodeLife] = field(default_factory=dict)  # what it knows of all nodes
    record: "Record | None" = None  # on its disk
    torn: bool = False  # it died in the middle of a step, which was not taken back yet

    @property
    def life(self) -> Life:
        return self.name, self.boot


@dataclass
class Record:
    """A step that is not durable yet: how the rows were before it."""

    memory_life: int
    stamp: int
    before: dict[Place, object]


class Overlay:
    """All nodes. `hear` is called when a node learns something of another one."""

    def __init__(self, names: list[str], partitions: int, rng: random.Random) -> None:
        self.rng = rng
        self.nodes = {name: Node(name, number) for number, name in enumerate(names)}
        self.partitions = partitions
        self.expelled: dict[Life, set[str]] = {}  # by life: who has stopped to listen to it
        self.gone: set[Life] = set()
        self.served: dict[Place, Cell] = {}
        self.boots = 0
        self.lost = 0.1
        for node in self.nodes.values():
            self.begin_life(node)
        for node in self.nodes.values():
            self.learn_all(node)

    # --- lives ---------------------------------------------------------------------------------------------------------------

    def begin_life(self, node: Node) -> None:
        self.boots += 1
        node.boot, node.up = self.boots, True
        self.learn_all(node)

    def learn_all(self, node: Node) -> None:
        """Who joins knows of every life that is there; not yet who of them was expelled."""
        for other in self.nodes.values():
            self.learn(node, other.name)

    def learn(self, node: Node, other: str) -> None:
        """The latest life of another node, and what this one knows of its end."""
        life = self.nodes[other].life
        expelled, gone = life in node.frozen, life in self.gone and life in node.frozen
        node.lives[other] = e.NodeLife(other, life[1], life[1], frozenset(range(self.partitions)), expelled, gone)

    def crash(self, node: Node) -> None:
        node.up = False

    def restart(self, node: Node) -> None:
        """It comes back; if anybody was expelled that it did not hear of, or its memory is gone, it starts over."""
        if not self.is_whole(node):
            self.lose_memory(node)
            source = self.rng.choice([other for other in self.nodes.values() if other.up])
            node.memory, node.empty = dict(source.memory), False
            node.clock = max(node.clock, source.clock)
            for life in source.frozen:
                self.freeze(node, life)
        self.begin_life(node)

    def is_whole(self, node: Node) -> bool:
        """Whether it goes on with what it has in memory."""
        return not node.empty and all(life in node.frozen for life in self.expelled)

    def lose_memory(self, node: Node) -> None:
        node.memory, node.empty, node.memory_life = {}, True, node.memory_life + 1

    def may_lose(self, node: Node) -> bool:
        """Whether all others are there: no promise survives the loss of the last holder. Nor is exactly once promised where a
        node that died in the middle of a step is lost for good before its server took the step back.
        """
        others = [other for other in self.nodes.values() if other is not node]
        well = all(other.up and other.life not in self.expelled for other in others)
        return bool(others) and well and not any(one.torn for one in self.nodes.values())

    def expel(self, life: Life) -> None:
        self.expelled[life] = set()

    def freeze(self, node: Node, life: Life) -> None:
        """A node hears of an expulsion."""
        node.frozen[life] = None
        self.expelled.setdefault(life, set()).add(node.name)

    def retire(self, life: Life) -> bool:
        """All who are there have stopped to listen: what is left is laid together. Returns whether that was possible."""
        there = [node for node in self.nodes.values() if node.up and node.life != life and node.life not in self.expelled]
        if life in self.gone or not there or any(life not in node.frozen for node in there):
            return False
        for node in there:
            for other in there:
                self.merge(node, other.memory)
        self.gone.add(life)
        return True

    # --- rows ----------------------------------------------------------------------------------------------------------------

    def stamp(self, node: Node, now_ms: int) -> int:
        node.clock = max(node.clock + 1, now_ms)
        return node.clock * 16 + node.number

    def write(self, node: Node, cells: dict[Place, object], stamp: int) -> None:
        for place, value in cells.items():
            node.memory[place] = Cell(stamp, value, node.life)

    def merge(self, node: Node, cells: dict[Place, Cell]) -> None:
        for place, cell in cells.items():
            known = node.memory.get(place)
            if known is None or known.stamp < cell.stamp:
                node.memory[place] = cell
            node.clock = max(node.clock, cell.stamp // 16 + 1)

    def deliver(self, node: Node, cells: dict[Place, Cell], origin: Life) -> None:
        if node.up and origin not in node.frozen:
            self.merge(node, cells)

    def compare(self) -> None:
        """Two nodes bring each other what they lack, if they agree on who is not listened to."""
        there = [node for node in self.nodes.values() if node.up]
        if len(there) < 2:
            return
        one, other = self.rng.sample(there, 2)
        for life in self.expelled:  # they tell each other who is not listened to
            for node, told in ((one, other), (other, one)):
                if life in node.frozen and life not in told.frozen and told.life != life:
                    self.freeze(told, life)
        if one.frozen.keys() == other.frozen.keys() and one.life not in self.expelled and other.life not in self.expelled:
            self.merge(one, other.memory)
            self.merge(other, one.memory)

    def has(self, name: str, cells: dict[Place, int]) -> bool:
        """Whether a node says that it has these stamps."""
        memory = self.nodes[name].memory
        return self.nodes[name].up and all(place in memory and memory[place].stamp >= stamp for place, stamp in cells.items())

    def lacking(self, node: Node, cells: dict[Place, int]) -> list[str]:
        """Who of the holders, as a node knows them, does not say that it has these stamps."""
        others = (other for other in self.nodes.values() if other is not node and other.life not in node.frozen)
        return [other.name for other in others if node.life in other.frozen or not self.has(other.name, cells)]
