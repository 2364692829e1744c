"""`python -m ekko.snapshots RUN_DIR URL NODE FULL_EVERY_S KEEP KIND`: one snapshot, for the daemon that started this process.

Tells what it does in lines of JSON on standard output. Ends when standard input does: its daemon is gone then.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ekko.errors import EkkoError
from ekko.snapshots.folders import open_folder
from ekko.snapshots.take import Kind, Plan, take

PROGRESS_S = 0.2
NICENESS = 10


def _say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main(run_dir: str, url: str, node: str, full_every_s: str, keep: str, kind: Kind) -> int:
    """Returns the exit code."""
    os.nice(NICENESS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told_s = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal told_s
        if (now := time.monotonic()) - told_s >= PROGRESS_S:
            told_s = now
            _say(done=done, total=total)

    begin = time.monotonic()
    try:
        plan = Plan(float(full_every_s), int(keep))
        manifest = take(Path(run_dir), open_folder(url), node, plan, kind, progress)
    except EkkoError as error:
        _say(error=str(error))
        return 1
    _say(
        name=manifest.name,
        created_ms=manifest.created_ms,
        bytes=manifest.bytes,
        rows=manifest.rows,
        full=manifest.parent is None,
        seconds=time.monotonic() - begin,
    )
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])  # type: ignore[arg-type]
    sys.stdout.flush()
    os._exit(code)  # a thread waits for standard input
