"""Freed messages stay in the heap: the next ones need no new pages."""

import subprocess
import sys

import pytest

from ekko.heap import keep_freed_memory

# Messages as a node that forwards sees them: several at once, then none. Prints the page faults of the last rounds.
MESSAGES = """
import resource, sys
from ekko.heap import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
def faults():
    held = [bytearray(256_000) for _ in range(16)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del held
    for _ in range(50):
        held = [bytearray(256_000) for _ in range(16)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", MESSAGES, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_freed_messages_cost_the_next_ones_no_page_faults() -> None:
    assert faults("keep") < 1_000 < faults("leave")
