"""`python -m ekko.train.server`: a server, for the node that started this process."""

from ekko.companions.channel import run
from ekko.train.server.process import serve

run(serve)
