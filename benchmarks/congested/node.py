"""`python -m benchmarks.congested.node OUTBOX PYTHON -m ekko.cli node ...`: the same node with another outbox, for comparison.

Operators are not offered the choice, so the node's own command does not have it.
"""

import sys
from functools import partial

from ekko.cli import main
from ekko.node import parts
from p2p.machine import MachineOptions

if __name__ == "__main__":
    outbox, *command = sys.argv[1:]
    parts.MachineOptions = partial(MachineOptions, outbox=outbox)  # type: ignore[misc, assignment]
    sys.argv = ["ekko", *command[command.index("ekko.cli") + 1 :]]
    main()
