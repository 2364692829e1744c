"""A companion's end of what it and its node say to each other: lines of JSON, over its standard input and output.

To the companion comes `begin` first, what it is to do; then whatever its kind is told. The node hears `state`, now and then,
for whoever looks at the node; `error`, why the companion ends; and whatever its kind asks. The node's end is
`ekko.node.companion`.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

from ekko.errors import EkkoError

LINE_BYTES_MAX: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1


class Channel:
    """The companion's end. Made once, by `run`."""

    def __init__(self) -> None:
        # What libraries print goes to the node's log, and not between the lines.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._writing = threading.Lock()

    def read_begin(self) -> Mapping[str, Any]:
        """What the first line says. Blocks.

        Raises:
            EkkoError: this was not started by a node.
        """
        line = sys.stdin.buffer.readline(LINE_BYTES_MAX)
        try:
            begin: Mapping[str, Any] = json.loads(line)["begin"]
        except (ValueError, KeyError, TypeError):
            raise EkkoError("this process is started by a node, as its configuration says: run `ekko node`") from None
        return begin

    def listen(self, hear: Callable[[Mapping[str, Any]], None]) -> None:
        """Have `hear` called with what the node says, in a thread: what holds up the rest must not outlive the node."""
        threading.Thread(target=self._listen, args=(hear,), name="node", daemon=True).start()

    @staticmethod
    def _listen(hear: Callable[[Mapping[str, Any]], None]) -> None:
        while line := sys.stdin.buffer.readline(LINE_BYTES_MAX):
            hear(json.loads(line))
        os._exit(1)  # the node is gone, and nothing may be written without it

    def say(self, **what: Any) -> None:
        """One line to the node. Safe in any thread."""
        with self._writing:
            self._out.write(json.dumps(what) + "\n")
            self._out.flush()


def run(serve: Callable[[Channel], None]) -> NoReturn:
    """A companion, from its start by a node to its end; says why where that is an error."""
    parent = os.getppid()
    # A node that is killed takes its companions with it, also one that is stopped just now.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    channel, code = Channel(), 1
    try:
        serve(channel)
        code = 0
    except EkkoError as error:
        channel.say(error=str(error))
    except Exception as error:  # noqa: BLE001 - the node tells of it
        traceback.print_exc()
        channel.say(error=f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    os._exit(code)  # threads wait for the node, and for answers of it
