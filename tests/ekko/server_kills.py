"""Servers, nodes, workers and the trainer are killed in the middle of training, and every batch counts exactly once.

`python -m tests.ekko.server_kills [ROUNDS] [SEED]`, or `scripts/server-kills`. Each round is a fresh cluster of two training
nodes with parameter servers and one that serves, and two workers that count (`server_counter`). At random moments something of
it gets a SIGKILL: a server's process, which its node starts again; a training node, which is started again, or is expelled,
upon which its spare takes over, and comes back later; a worker, or the one that is the trainer too, which are started again and
go on where their pushes ended; or all workers at once.

What servers answered is there from then on, whoever dies; in the end the rows of the servers and of the serving node are what
all batches come to, each counted once.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import ekko
from sim_cluster.processes import NodeSpec, wait_until
from tests.ekko.server_counter import DENSE, KEYS, TABLES, CounterJob, counted
from tests.ekko.training_processes import TrainingCluster, table_settings

COUNTER = Path(__file__).with_name("server_counter.py")
NODES = (NodeSpec("home-1", "home", "train"), NodeSpec("home-2", "home", "train"), NodeSpec("eu-1", "eu"))
MODEL = {
    "mode": "async",
    "partitions": 4,
    "tables": {table: table_settings(dim, {"name": "sgd", "lr": 1.0}, {"name": "zeros"}) for table, dim in TABLES.items()},
}
WORKERS = 2
# So many more batches than are waited for may be trained, and no further ones: what is killed is killed in the middle of them,
# and however long this process stands still, batches are left that come upon it.
AHEAD = 40
GONE_S_MAX = 120.0
DEADLINE_S = 120.0
START_S_MAX = 180.0  # many rounds are run beside other work


class Counting:
    """One worker's process, over all its lives."""

    def __init__(self, job: CounterJob) -> None:
        self.job = job
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.job.path("stderr").open("ab") as stderr:
            self._process = subprocess.Popen([sys.executable, str(COUNTER), str(self.job.save())], stderr=stderr)

    @property
    def acked(self) -> int:
        return self.job.said("acked")

    def grant(self, steps: int) -> None:
        """So many batches, all in all, may be trained."""
        self.job.say("granted", max(steps, self.granted))

    @property
    def granted(self) -> int:
        return self.job.said("granted")

    @property
    def done(self) -> bool:
        return self.job.path("done").exists()

    def check(self) -> None:
        ended = self._process is not None and self._process.poll() not in (None, 0)
        assert not ended, self.job.path("stderr").read_text()[-2_000:]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Round:
    """One cluster, its workers, and what happens to them."""

    def __init__(self, cluster: TrainingCluster, folder: Path) -> None:
        self.cluster = cluster
        endpoints = list(cluster.endpoints.values())
        self.workers = [
            Counting(CounterJob(str(folder), endpoints, number, local=cluster["home-1"].local if number == 0 else ""))
            for number in range(WORKERS)
        ]
        folder.mkdir(parents=True, exist_ok=True)

    def progress(self, steps: int) -> None:
        """Wait until each worker has so many more batches answered."""
        wanted = [worker.acked + steps for worker in self.workers]
        for worker, number in zip(self.workers, wanted, strict=True):
            worker.grant(number + AHEAD)

        def there() -> bool:
            for worker in self.workers:
                worker.check()
            return all(worker.acked >= number for worker, number in zip(self.workers, wanted, strict=True))

        wait_until(there, f"{steps} more batches of each worker are answered", DEADLINE_S)

    def kill_server(self, node: str) -> None:
        """A server's process; its node starts it again."""
        process = self.cluster[node]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            os.kill(int(children[0]), signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """A node, and with it its server; both are started again."""
        self.cluster[node].kill()
        self.cluster[node].start()
        self.cluster[node].wait_ready()

    def replace_node(self, node: str) -> None:
        """A node is gone for good: its spare takes over, and training goes on without it. Later it comes back."""
        other = "home-2" if node == "home-1" else "home-1"
        self.cluster[node].kill()
        wait_until(lambda: self._expelled(node, other), f"{node} is expelled", GONE_S_MAX)
        self.progress(10)  # without it
        self.cluster[node].start()
        self.cluster[node].wait_ready()

    def _expelled(self, node: str, at: str) -> bool:
        return self.cluster[at].post("/expel", {"node": node})[0] == 200

    def kill_worker(self, number: int) -> None:
        """A worker, which starts again."""
        self.workers[number].kill()
        self.check_acknowledged()
        self.workers[number].start()

    def kill_workers(self) -> None:
        """All of them."""
        for worker in self.workers:
            worker.kill()
        self.check_acknowledged()
        for worker in self.workers:
            worker.start()

    def check_acknowledged(self) -> None:
        """What was answered is on every training node that runs."""
        least = counted({number: worker.acked for number, worker in enumerate(self.workers)})
        for node in self.cluster.endpoints:
            if self.cluster[node].running:
                for table, rows in held(self.cluster, node, "ctr.training").items():
                    assert (rows <= least[table]).all(), f"{node} lacks answered batches in table {table}"

    def finish(self) -> None:
        """All batches that were granted are trained, each once, and served."""
        for worker in self.workers:
            worker.job.path("last").touch()
        wait_until(self._all_done, "all workers are through", DEADLINE_S)
        exact = counted({number: worker.granted for number, worker in enumerate(self.workers)})
        places = [(node, "ctr") for node in self.cluster.nodes] + [(node, "ctr.training") for node in self.cluster.endpoints]

        def equal() -> bool:
            return all(
                rows.tobytes() == exact[table].tobytes()
                for node, model in places
                for table, rows in held(self.cluster, node, model).items()
            )

        try:
            wait_until(equal, "every node holds all batches, each once", DEADLINE_S)
        except TimeoutError as error:
            found = {
                (node, model, table): float((rows - exact[table]).sum())
                for node, model in places
                for table, rows in held(self.cluster, node, model).items()
            }
            raise AssertionError(f"{error}: too much (below 0) or too little, by table: {found}") from None
        wait_until(lambda: self._dense_at("eu-1") == self.workers[0].granted, "the trainer's dense parameter", DEADLINE_S)

    def _all_done(self) -> bool:
        for worker in self.workers:
            worker.check()
        return all(worker.done for worker in self.workers)

    def _dense_at(self, node: str) -> float:
        with ekko.Reader("ctr", run_dir=self.cluster[node].run_dir, wait=60.0) as reader:
            return float(reader.dense(DENSE)[0])


def held(cluster: TrainingCluster, node: str, model: str) -> dict[str, np.ndarray]:
    """All rows that a node holds of a model."""
    with ekko.Reader(model, run_dir=cluster[node].run_dir, wait=60.0) as reader:
        return {table: reader.lookup(table, np.arange(KEYS, dtype=np.uint64)) for table in TABLES}


def actions(one: Round) -> dict[str, Callable[[random.Random], None]]:
    """What may happen."""
    return {
        "server": lambda rng: one.kill_server(rng.choice(("home-1", "home-2"))),
        "node": lambda rng: one.kill_node(rng.choice(("home-1", "home-2"))),
        "expelled": lambda rng: one.replace_node("home-2"),
        "worker": lambda rng: one.kill_worker(1),
        "trainer": lambda rng: one.kill_worker(0),
        "workers": lambda rng: one.kill_workers(),
    }


def run(folder: Path, seed: int, kinds: list[str]) -> int:
    """One round: `kinds` happen in their order, between batches; returns how often requests were sent again, by the workers'
    last lives."""
    rng = random.Random(seed)
    with TrainingCluster(folder / "nodes", NODES, MODEL) as cluster, ExitStack() as stack:
        cluster.start(START_S_MAX)
        one = Round(cluster, folder / "work")
        for worker in one.workers:
            stack.callback(worker.kill)
            worker.start()
        one.progress(8)
        for kind in kinds:
            actions(one)[kind](rng)
            one.progress(rng.randint(4, 20))
        one.finish()
        return sum(worker.job.said("retries") for worker in one.workers)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    begin, met, retries = time.monotonic(), Counter[str](), 0
    for number in range(seed, seed + rounds):
        rng = random.Random(number)
        kinds = [rng.choice(("server", "node", "expelled", "worker", "trainer", "workers")) for _ in range(6)]
        met.update(kinds)
        with TemporaryDirectory(prefix="ekko-kills-") as folder:
            try:
                retries += run(Path(folder), number, kinds)
            except BaseException:
                sys.stdout.write(f"seed {number}: {kinds}\n")
                raise
    sys.stdout.write(f"{rounds} rounds from seed {seed}: {dict(met)}, {retries} requests again: every batch counted once\n")
    sys.stdout.write(f"{time.monotonic() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
