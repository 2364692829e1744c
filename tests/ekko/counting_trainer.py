"""A trainer process, for tests that read beside it: each step adds one to all rows of two tables and all dense parameters.

`counting_trainer.py ADDRESS DENSE_EVERY [apart]`: trains until it is killed; prints "ready" once its beginnings are visible.
With "apart" dense parameters are published in a step of their own, before the rows that were trained with them.
"""

import sys

import torch
from torch import nn

import ekko.torch
from ekko import Publisher

ROWS = 300
TABLES = {"item": 16, "user": 4}
TIMEOUT_S = 60.0  # a busy machine included


def main(address: str, dense_every: int, *, apart: bool) -> None:
    model = nn.ModuleDict({name: nn.Embedding(ROWS, dim, sparse=True) for name, dim in TABLES.items()})
    model["top"] = nn.Linear(300, 4)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Publisher(address, model="ctr", tables=TABLES, timeout=TIMEOUT_S) as publisher:
        every = None if apart else dense_every
        tables = {name: name for name in TABLES}
        tracker = ekko.torch.track(model, optimizer, publisher, tables, dense_every=every, background=False)
        publisher.wait(tracker.publish_all(), "all", TIMEOUT_S)
        ids = torch.arange(ROWS)
        for number in range(1, 1 << 30):
            optimizer.zero_grad()
            loss = sum(model[name](ids).sum() for name in TABLES) + sum(value.sum() for value in model["top"].parameters())
            (-loss).backward()
            if apart and number % dense_every == 0:
                with publisher.step() as step:  # what they are going to be
                    for name, value in model["top"].named_parameters():
                        step.publish_dense(f"top.{name}", value.detach().numpy() + 1)
            optimizer.step()
            if number == 1:
                sys.stdout.write("ready\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), apart="apart" in sys.argv[3:])
