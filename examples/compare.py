"""Runs the examples on real nodes of this machine, and says how good what a serving node answers is after each.

    python examples/compare.py                     # all events, three seeds: some minutes
    python examples/compare.py --events 20000 --seeds 1

The quality is the AUC on the events that were held out, of predictions with the rows and dense parameters that the serving node
has in its shared memory once the example has ended.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from stream import Batch, Stream

import ekko
from ekko.serve.together import State
from ekko.zoo import DLRM
from sim_cluster.demo.evaluation import auc
from sim_cluster.processes import LocalCluster, NodeSpec

HERE = Path(__file__).parent
NODES = (NodeSpec("train-1", "home", "train"), NodeSpec("eu-1", "eu"))
DELAYS_MS = {"home/eu": 10.0}
TIMEOUT_S = 900
# What each example is started with, before the arguments that all of them have.
STYLES: Mapping[str, Sequence[str]] = {
    "hooks": ("hooks.py",),
}


@torch.no_grad()
def quality(reader: ekko.Reader, stream: Stream) -> float:
    """The AUC of what a node has, on the events that were held out."""
    model = DLRM(stream.shape, with_tables=False).eval()
    events = stream.held_out

    def read(state: State) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return state.lookup_many({name: ids.numpy() for name, ids in events.ids.items()}), state.dense_many()

    rows, tensors = reader.together(read, timeout=10.0)  # rows and tensors of one moment
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()})
    logits = model(events.dense, embeddings=torch.stack([torch.from_numpy(rows[name]) for name in stream.tables], dim=1))
    return auc(labels_of(events), logits.numpy())


def labels_of(events: Batch) -> np.ndarray:
    """float32[n]."""
    return events.labels.numpy()


def cluster_in(folder: Path) -> LocalCluster:
    """A training node, and a serving one in another region."""
    return LocalCluster(folder, NODES, delays_ms=DELAYS_MS)


def run(cluster: LocalCluster, style: str, seed: int, events: int | None) -> str:
    """Run an example to its end; returns the name of the model that it trained.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    model = f"{style}-{seed}"
    command = [sys.executable, *STYLES[style], cluster["train-1"].local, "--model", model, "--seed", str(seed)]
    command += [] if events is None else ["--events", str(events)]
    subprocess.run(command, cwd=HERE, check=True, timeout=TIMEOUT_S)
    return model


def main() -> None:
    """Print a table: the AUC of each style with each seed, and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, help="how many events of the stream; else all")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each, with first weights of their own")
    options = parser.parse_args()
    stream = Stream(options.events)
    events = stream.held_out
    print(f"{stream.name}: AUC on the last {len(events.labels)} events, as a node in another region serves the model")
    with tempfile.TemporaryDirectory() as folder, cluster_in(Path(folder)) as cluster:
        cluster.start()
        for style in STYLES:
            found = []
            for seed in range(options.seeds):
                model = run(cluster, style, seed, options.events)
                with ekko.Reader(model, cluster["eu-1"].run_dir, wait=10.0) as reader:
                    found.append(quality(reader, stream))
            seeds = "  ".join(f"{value:.4f}" for value in found)
            print(f"{style:18s} {np.mean(found):.4f}   of {seeds}", flush=True)


if __name__ == "__main__":
    main()
