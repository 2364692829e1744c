"""Where log records go."""

import subprocess
import sys

PROGRAM = """
import io, sys, structlog
from ekko.logs import configure_logs

log, real = structlog.get_logger("of a module"), sys.stderr
configure_logs(this_node="eu-1")
sys.stderr = io.StringIO()
log.warning("first")  # it is kept from now on
first = sys.stderr
sys.stderr = io.StringIO()
first.close()
log.warning("second")
real.write(sys.stderr.getvalue())
"""


def test_records_go_to_what_is_stderr_at_the_time() -> None:
    """As where a command runs within a program, or a test, which has its stderr for itself."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"event": "second"' in done.stderr
    assert '"this_node": "eu-1"' in done.stderr
