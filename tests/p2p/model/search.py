"""Random walks through the model; a walk that ends in a false claim is cut to the actions that it needs.

    python -m tests.p2p.model.search --seconds 60            all rules on: nothing may be found
    python -m tests.p2p.model.search --seconds 60 RULE ...   each of these rules off, one at a time; `each`: all of them

What is found with a rule off belongs into `counterexamples`.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence

from tests.p2p.model.parts import KEYS, NODES, ORIGINS, FalseClaimError
from tests.p2p.model.rules import RULES
from tests.p2p.model.state_mode import Model
from tests.p2p.model.walks import Action, Walk, show_walk

STEPS = (20, 120)
KINDS = {
    "write": 0.16,
    "send": 0.3,
    "deliver": 0.4,
    "congest": 0.05,
    "notice": 0.06,
    "row": 0.08,
    "pull": 0.03,
    "lose": 0.02,
    "stall": 0.01,
    "drop": 0.05,
    "raise_class": 0.03,
    "pass_on": 0.02,
    "calm": 0.01,
    "turn": 0.01,
    "crash": 0.01,
    "hear": 0.03,
    "retire": 0.01,
    "tell_retired": 0.02,
}
# What a walk has much of; most false claims need several of a kind.
THEMES: tuple[tuple[str, ...], ...] = (
    (),
    ("stall", "lose"),
    ("pass_on", "write"),
    ("crash", "pull", "retire", "tell_retired", "hear"),
    ("drop", "raise_class", "row"),
)
THEME_WEIGHT = 6


class Walker:
    """One walk, whose kinds of actions, keys and faults are its own: a few at a time show more than all at once."""

    def __init__(self, rng: random.Random, off: frozenset[str]) -> None:
        self.rng, self.model = rng, Model(off)
        weights = {kind: weight * rng.choice((0, 0.5, 1, 1, 3)) for kind, weight in KINDS.items()}
        for kind in ("write", "send", "deliver", "congest", "notice"):
            weights[kind] = max(weights[kind], KINDS[kind])
        for kind in rng.choice(THEMES):
            weights[kind] = THEME_WEIGHT * KINDS[kind]
        self.kinds, self.weights = list(weights), list(weights.values())
        self.keys = rng.choice((KEYS, KEYS, (0, 1), (0,), (0, 2)))
        self.first, self.keep, self.full = rng.choice((0.3, 0.9, 1.0)), rng.choice((0.0, 0.1)), rng.choice((0.0, 0.1, 0.3))

    def steps(self) -> int:
        return self.rng.randint(*STEPS)

    def draw(self) -> Action:
        """An action that means something as a rule."""
        rng, model = self.rng, self.model
        kind = rng.choices(self.kinds, self.weights)[0]
        if kind == "write":
            return kind, rng.choice(ORIGINS), rng.choice(self.keys)
        if kind == "deliver":
            index = 0 if rng.random() < self.first else rng.randrange(len(model.messages) or 1)
            return kind, index, rng.random() < self.keep, rng.random() < self.full
        if kind == "lose":
            return kind, rng.randrange(len(model.messages) or 1)
        if kind in ("send", "notice", "calm", "raise_class"):
            links = [(node.node, child) for node in model.nodes for child in node.backlogs]
            node, child = rng.choice(links) if links else (0, 1)
            if kind == "send":
                backlog = model.nodes[node].backlogs.get(child)
                return kind, node, child, rng.choice(sorted(backlog.due)) if backlog and backlog.due else 0
            return (kind, node, child, rng.choice(self.keys)) if kind == "raise_class" else (kind, node, child)
        if kind in ("congest", "pull", "stall", "hear", "tell_retired"):
            return kind, *rng.sample(NODES, 2)
        if kind == "row":
            return kind, *rng.sample(NODES, 2), rng.choice(self.keys)
        if kind == "pass_on":
            return kind, *rng.sample(NODES, 3), rng.choice(self.keys)
        if kind == "drop":
            return kind, rng.choice(NODES), rng.choice(self.keys)
        if kind == "crash":
            return kind, rng.choice(NODES), rng.random() < 0.5
        if kind == "retire":
            return kind, rng.choice(sorted(model.origin_of))
        return kind, rng.choice(NODES)


def replay(walk: Sequence[Action], off: frozenset[str]) -> str | None:
    """What is false after these actions; None: nothing."""
    model = Model(off)
    try:
        for action in walk:
            model.act(action)
    except FalseClaimError as error:
        return str(error)
    return None


def shortest(walk: Walk, off: frozenset[str]) -> Walk:
    """The same without what it does not need."""
    again = True
    while again:
        again = False
        for width in (2, 1):
            for index in range(len(walk) - width, -1, -1):
                without = walk[:index] + walk[index + width :]
                if replay(without, off):
                    walk, again = without, True
    return walk


class Search:
    """Walks until one finds something, or the time is over."""

    def __init__(self, seed: int, off: frozenset[str]) -> None:
        self.rng, self.off = random.Random(seed), off
        self.walks = self.actions = self.claims = 0

    def walk(self) -> Walk | None:
        """One walk; cut, if it ends in a false claim."""
        walker, walk = Walker(self.rng, self.off), Walk()
        try:
            for _ in range(walker.steps()):
                walk.append(walker.draw())
                if not walker.model.act(walk[-1]):
                    walk.pop()
        except FalseClaimError:
            return shortest(walk, self.off)
        finally:
            self.walks, self.actions = self.walks + 1, self.actions + len(walk)
            self.claims += walker.model.claims
        return None

    def run(self, seconds: float, walks_max: int = 1 << 40) -> Walk | None:
        """The first false claim that is found; None: there was none."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.walks < walks_max:
            found = self.walk()
            if found:
                return found
        return None


def main() -> None:
    """Search, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=1, help="the shortest of so many finds")
    parser.add_argument("rules", nargs="*", help="to switch off")
    options = parser.parse_args()
    rules = list(RULES) if options.rules == ["each"] else options.rules
    for off in [frozenset({rule}) for rule in rules] or [frozenset[str]()]:
        search = Search(options.seed, off)
        finds = [found for _ in range(options.tries) if (found := search.run(options.seconds / options.tries))]
        told = f"{search.walks} walks, {search.actions} actions, {search.claims} claims taken"
        best = min(finds, key=len, default=Walk())
        sys.stdout.write(f"off: {', '.join(off) or 'nothing'}; {told}: {replay(best, off) or 'no false claim'}\n")
        sys.stdout.write(f"    {show_walk(best)}\n" if best else "")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
