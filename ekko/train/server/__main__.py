"""`python -m ekko.train.server`: a server, for the node that started this process."""

import os
import sys

from ekko.train.server.process import main

code = main()
sys.stdout.flush()
os._exit(code)  # threads wait for the node, and for answers of it
