"""Runs the examples on real nodes of this machine, and says how good what a serving node answers is after each.

    python examples/compare.py                     # all events, three seeds: five minutes on two cores
    python examples/compare.py --events 20000 --seeds 1

The quality is the AUC on the events that were held out, of predictions with the rows and dense parameters that the serving node
has in its shared memory once the example has ended.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stream import Stream

import ekko
from ekko.serve.together import State
from ekko.zoo import DLRM
from sim_cluster.demo.evaluation import auc
from sim_cluster.processes import LocalCluster, NodeSpec, free_ports

HERE = Path(__file__).parent
NODES = (NodeSpec("train-1", "home", "train"), NodeSpec("eu-1", "eu"))
DELAYS_MS = {"home/eu": 10.0}
TIMEOUT_S = 900
RANKS = 2
# What each example is started with.
STYLES: Mapping[str, Sequence[str]] = {
    "hooks": ("hooks.py",),
    "ddp_hooks": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "ddp_hooks.py"),
    "parameter_server": ("parameter_server.py",),
}


class Cluster(LocalCluster):
    """A training node with a server for a model of each seed, as in server.toml, and a serving node in another region."""

    def __init__(self, folder: Path, seeds: int) -> None:
        super().__init__(folder, NODES, delays_ms=DELAYS_MS)
        self.server = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        settings: dict[str, Any] = tomllib.loads((HERE / "server.toml").read_text())["server"]["models"]["ctr"]
        lines = ["[server]", f"listen = {json.dumps(self.server)}"]
        for seed in range(seeds):
            name = f"server.models.{model_of('parameter_server', seed)}"
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items() if key != "tables")]
            for table, own in settings["tables"].items():
                initial = {**own["initializer"], "seed": seed}
                lines += [f"[{name}.tables.{table}]", *(f"{key} = {inline(value)}" for key, value in own.items())]
                lines[-1] = f"initializer = {inline(initial)}"
        with self["train-1"].config_path.open("a") as file:
            file.write("\n".join(lines) + "\n")

    def run(self, style: str, seed: int, events: int | None) -> str:
        """Run an example to its end; returns the name of the model that it trained.

        Raises:
            subprocess.CalledProcessError: it failed; it has said why.
        """
        model = model_of(style, seed)
        command = [sys.executable, *STYLES[style], self["train-1"].local]
        command += [self.server] if style == "parameter_server" else []
        command += ["--model", model, "--seed", str(seed), *([] if events is None else ["--events", str(events)])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # which torchrun would set, with a warning
        subprocess.run(command, cwd=HERE, check=True, timeout=TIMEOUT_S, env=environment)
        return model


def model_of(style: str, seed: int) -> str:
    """The name of a model."""
    return f"{style}-{seed}"


def inline(value: Any) -> str:
    """A value in TOML."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{ " + ", ".join(f"{key} = {json.dumps(one)}" for key, one in value.items()) + " }"


@torch.no_grad()
def quality(reader: ekko.Reader, stream: Stream) -> float:
    """The AUC of what a node has, on the events that were held out."""
    model = DLRM(stream.shape, with_tables=False).eval()
    events = stream.held_out

    def read(state: State) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return state.lookup_many({name: ids.numpy() for name, ids in events.ids.items()}), state.dense_many()

    rows, tensors = reader.together(
        read, timeout=60.0
    )  # of one moment; a node that has just caught up on much settles for a while
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    logits = model(events.dense, embeddings=torch.stack([torch.from_numpy(rows[name]) for name in stream.tables], dim=1))
    return auc(events.labels.numpy(), logits.numpy())


def main() -> None:
    """Print a table: the AUC of each style with each seed, and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, help="how many events of the stream; else all")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each, with first weights of their own")
    options = parser.parse_args()
    stream = Stream(options.events)
    held_out = len(stream.held_out.labels)
    print(f"{stream.name}: AUC on the last {held_out} events, of the model as a node in another region serves it")
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), options.seeds) as cluster:
        cluster.start()
        for style in STYLES:
            found = []
            for seed in range(options.seeds):
                model = cluster.run(style, seed, options.events)
                with ekko.Reader(model, cluster["eu-1"].run_dir, wait=10.0) as reader:
                    found.append(quality(reader, stream))
            seeds = "  ".join(f"{value:.4f}" for value in found)
            print(f"{style:18s} {np.mean(found):.4f}   of {seeds}", flush=True)


if __name__ == "__main__":
    main()
