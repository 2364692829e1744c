"""`python -m ekko.sinks`: one feed, for the node that started this process."""

from ekko.companions.channel import run
from ekko.sinks.process import serve

run(serve)
