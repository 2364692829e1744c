"""A trainer of `test_checkpoint_processes.py`: trains, saves checkpoints, and goes on from one that it finds.

    python checkpoint_trainer.py FOLDER LOCAL RUN_DIR STEPS

Writes FOLDER/steps: a line for each step, the keys that it touched; and at its end FOLDER/done.npz: the table.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ekko
import ekko.torch
from ekko.errors import ModelError

ROWS, DIM, TOUCHED = 300, 8, 12
SAVE_EVERY = 5
LIVES = "eu"  # a region


class Model(nn.Module):
    """A table and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ROWS, DIM, sparse=True)
        self.top = nn.Linear(DIM, 1)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.top(self.item(items)).square().mean()
        return loss


def main(folder: Path, local: str, run_dir: Path, steps: int) -> None:
    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.disable()
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    with (
        ekko.Publisher(local, "ctr", {"item": DIM}, timeout=60.0) as publisher,
        ekko.Reader("ctr", run_dir, wait=60.0, counted=False) as reader,
        ekko.torch.track(model, optimizer, publisher, {"item": "item"}, dense_every=1, reader=reader) as tracker,
    ):
        checkpoint = ekko.torch.checkpoint_hook(tracker, optimizer, timeout=2.0)
        saved = folder / "checkpoint.pt"
        first = 0
        if saved.exists():
            state = torch.load(saved, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            # A region that lives may answer late, on a busy machine: then all are asked again.
            told = ""
            while not told or LIVES in told.partition("(")[0]:
                try:
                    told = f"it went on: {checkpoint.resume()}"
                except ModelError as error:
                    told = str(error)
            (folder / "refused").write_text(told)
            checkpoint.remove()
            checkpoint = ekko.torch.checkpoint_hook(tracker, optimizer, unreachable="accept", timeout=1.0)
            unheard: tuple[str, ...] = (LIVES,)
            while LIVES in unheard:
                optimizer.load_state_dict(state["optimizer"])
                above = checkpoint.resume().above
                assert above is not None
                unheard = above.unheard
        else:
            publisher.publish_above(ahead_of_now(45_000))  # as if this machine's clock were ahead
            tracker.publish_all()
        with (folder / "steps").open("a") as log:
            for number in range(first, steps):
                seed = (first, number)  # who goes on sees other samples than the run before
                items = torch.from_numpy(np.random.default_rng(seed).integers(0, ROWS, TOUCHED))
                optimizer.zero_grad()
                model(items).backward()
                optimizer.step()
                tracker.flush()
                print(number, *sorted(set(items.tolist())), file=log, flush=True)
                if (number + 1) % SAVE_EVERY == 0 and number < 2 * SAVE_EVERY:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}
                    torch.save(state, folder / "new.pt")
                    (folder / "new.pt").replace(saved)
        publisher.wait(tracker.flush(), scope="region", timeout=60.0)
        weight, bias = model.top.weight.detach().numpy(), model.top.bias.detach().numpy()
        np.savez(folder / "new.npz", item=model.item.weight.detach().numpy(), weight=weight, bias=bias)
        (folder / "new.npz").replace(folder / "done.npz")


def ahead_of_now(by_ms: int) -> int:
    """A stamp of that moment."""
    from p2p.runtime import read_clock
    from p2p.stamps import make_stamp

    return make_stamp(read_clock().unix_ms + by_ms, 0, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
