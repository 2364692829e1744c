"""What the demo's worker processes have in common: one thread, and one line on stderr when something fails."""

import signal
import sys
from collections.abc import Callable

import torch

from ekko.errors import EkkoError
from sim_cluster.demo.board import StoppedError

STOPPED_STATUS = 3
FAILED_STATUS = 2


def run_worker(run: Callable[[], None]) -> None:
    """Run a worker to its end and exit with its status.

    Interrupts are the demo's to handle: a terminal sends Ctrl-C to every process of the group, and the workers are told to
    stop through the board.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # a dozen processes share the machine
    try:
        run()
    except StoppedError:
        sys.exit(STOPPED_STATUS)
    except (EkkoError, TimeoutError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(FAILED_STATUS)
