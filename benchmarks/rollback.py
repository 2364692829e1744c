"""`rollback`: how soon a minute of bad updates is gone from every replica, against a full reload of the same state.

Real nodes in two regions, of which each is a network namespace; what passes between them goes through the kernel's token bucket
of 100 Mbps, each way. At home are the training node and the witness; away are two serving nodes. The state is 1 GB of keys and
rows. Then bad updates come for a minute, to 0.6 % of the rows, again and again.

    restore      from the operator's request, which is the decision, to the moment at which every replica has every row of
                 before: fence, convergence, difference, plan and write-back included. `writers_back_s` is when writers go on.
                 By the witness's clock: `fence_s`, until it has all that was written; `compare_s`, until the plan is durable;
                 `write_s`, until all of it is stored there and sent; `visible_s`, until it knows that all have it.
    full reload  both serving nodes begin with empty memory and pull everything, over the same link, with the same codec and
                 compression. From the moment at which their sockets are there to the one at which they have caught up: the
                 start of their processes is not counted. The state crosses the link once; the second one has it from the first.

Without namespaces (not root) nothing is limited and the ratio is not measured. A reload that has not ended after `RELOAD_S_MAX`
has no figure, and the ratio is then that of the time in which the link carries the state once (`link_s`).
`detect_s` and `false_alarms` are of the detector that is the default, in virtual time, and no part of either
(`benchmarks.health.noticing`).
"""

import json
import statistics
import time
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import ekko
from benchmarks.common import MODEL, TABLE, Figure
from benchmarks.health import noticing
from benchmarks.limited.cluster import cluster_in
from benchmarks.limited.regions import Regions, missing
from ekko.errors import EkkoError
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeProcessError, NodeSpec, wait_until

TARGETS = {"speedup": ">= 100"}
DIM = 64
ROW_BYTES = 4 * DIM + 8  # with the key
STATE_BYTES, STATE_BYTES_QUICK = 1_000_000_000, 2_000_000
BAD_FRACTION = 0.006
BAD_S, BAD_S_QUICK = 60.0, 1.0
BAD_STEPS_PER_S = 5
RATE_MBPS = 100.0
ROUNDS = 5
BATCH = 20_000
SETTLE_S = 2.0
WAIT_S_MAX = 600.0
# At 100 Mbps the state crosses the link in 85 s.
RELOAD_S_MAX = 240.0
SERVING = ("serve-1", "serve-2")
# As the witness tells them (`ekko.rollback.machine.PHASES`).
PHASES = ("fence", "compare", "write", "visible")
NODES = [
    NodeSpec("train", "home", "train"),
    NodeSpec("witness", "home", "witness", settings={"delay": "0s", "log_bytes": "4GB"}),
    *(NodeSpec(name, "away") for name in SERVING),
]


def run(quick: bool) -> dict[str, Figure]:
    """Measure; a state of 2 MB, a second of bad updates and one round when quick."""
    noticed = noticing(quick)
    if reason := missing():
        missed = ("restore_s", "full_reload_s", "speedup")
        return {**dict.fromkeys(missed), **noticed, **{f"note_{figure}": reason for figure in missed}}
    rows = (STATE_BYTES_QUICK if quick else STATE_BYTES) // ROW_BYTES
    with TemporaryDirectory(prefix="ekko-bench-") as folder, Regions(["home", "away"]) as regions:
        model = ModelTables({TABLE: DIM}, capacity_rows=rows)
        with cluster_in(regions, Path(folder), NODES, {MODEL: model}) as cluster:
            cluster.start()
            bench = _Bench(cluster, rows)
            bench.fill()
            regions.limit(RATE_MBPS)
            rounds = []
            for number in range(1 if quick else ROUNDS):
                if number:  # as it goes on where it is judged; else the log has the rounds before
                    bench.judge_healthy()
                rounds.append(bench.take_back(BAD_S_QUICK if quick else BAD_S))
            ended, reload_s, caught_up = bench.reload()
    link_s = rows * ROW_BYTES * 8 / (RATE_MBPS * 1e6)  # nothing between two regions is sooner
    restore_s = statistics.median(one["restore_s"] for one in rounds)
    return {
        "restore_s": restore_s,
        "full_reload_s": reload_s if ended else None,
        "speedup": (reload_s if ended else link_s) / restore_s,
        "restore_s_max": max(one["restore_s"] for one in rounds),
        **{f"{phase}_s": statistics.median(one[f"{phase}_s"] for one in rounds) for phase in PHASES},
        "writers_back_s": statistics.median(one["writers_back_s"] for one in rounds),
        "rows_restored": rounds[-1]["rows"],
        "bytes_restored": rounds[-1]["bytes"],
        "rows_wrong": sum(one["rows_wrong"] for one in rounds),
        "state_bytes": rows * ROW_BYTES,
        "link_mbps": RATE_MBPS,
        "rounds": len(rounds),
        "reload_bytes": caught_up * ROW_BYTES,
        "link_s": link_s,
        **({} if ended else {"note_full_reload_s": f"not over after {reload_s:.0f} s; the ratio is that of link_s, its least"}),
        **noticed,
    }


class _Bench:
    """A cluster with a state of so many rows."""

    def __init__(self, cluster: LocalCluster, rows: int) -> None:
        self._cluster = cluster
        self._rows = rows
        self._rng = np.random.default_rng(1)
        self._bad = np.sort(self._rng.choice(rows, max(1, int(rows * BAD_FRACTION)), replace=False)).astype(np.uint64)
        self._good: np.ndarray = np.empty((0, DIM), np.float32)

    def fill(self) -> None:
        """Publish all rows, before the link is limited."""
        with ekko.Publisher(self._cluster["train"].local, MODEL, timeout=60) as publisher:
            stamp = 0
            for begin in range(0, self._rows, BATCH):
                keys = np.arange(begin, min(begin + BATCH, self._rows), dtype=np.uint64)
                stamp = publisher.publish(TABLE, keys, self._rng.normal(size=(keys.size, DIM)).astype(np.float32))
                if begin // BATCH % 8 == 7:
                    publisher.wait(stamp, "all", WAIT_S_MAX)
            publisher.wait(stamp, "all", WAIT_S_MAX)
        self._good = self._values("train")
        self.judge_healthy()

    def judge_healthy(self) -> None:
        """The witness's older state comes up to now, as it does where the model is judged healthy."""
        witness = self._cluster["witness"]

        def moved_on() -> bool:
            now_ms = time.time_ns() // 1_000_000
            body = {"model": MODEL, "state": "healthy", "from_ms": now_ms - 600_000, "why": "benchmark"}
            status, answer = witness.post("/health", body)
            assert status == 200, answer
            time.sleep(SETTLE_S)  # verdicts are of whole seconds
            return bool(witness.status()["delayed"]["log"]["pending_rows"] == 0)

        wait_until(moved_on, "the witness's older state has everything", WAIT_S_MAX)

    def _values(self, node: str) -> np.ndarray:
        """float32[bad rows, DIM]: what readers of a node find."""
        with closing(ekko.Reader(MODEL, run_dir=self._cluster[node].run_dir)) as reader:
            return reader.lookup(TABLE, self._bad)

    def take_back(self, bad_s: float) -> dict[str, float]:
        """One round: bad updates, then the rollback."""
        time.sleep(SETTLE_S)
        moment_ms = time.time_ns() // 1_000_000
        time.sleep(0.5)
        with ekko.Publisher(self._cluster["train"].local, MODEL, timeout=60) as publisher:
            end_s, part = time.monotonic() + bad_s, max(1, self._bad.size // (BAD_STEPS_PER_S * 4))
            at = 0
            while time.monotonic() < end_s or at < self._bad.size:
                chosen = self._bad[np.arange(at, at + part) % self._bad.size]
                at += part
                chosen = np.unique(chosen)
                publisher.publish(TABLE, chosen, self._rng.normal(50, 1, (chosen.size, DIM)).astype(np.float32))
                time.sleep(1 / BAD_STEPS_PER_S)
            begin_s = time.monotonic()
            asked = self._ask(moment_ms)
            readers = {name: ekko.Reader(MODEL, run_dir=self._cluster[name].run_dir) for name in self._cluster.nodes}
            restored_s = dict.fromkeys(readers, 0.0)
            wrong = np.full(self._bad.size, True)
            while not all(restored_s.values()):
                for name, reader in readers.items():
                    # The last rows of the plan come last; then all are looked at.
                    if not restored_s[name] and np.array_equal(reader.lookup(TABLE, self._bad[-64:]), self._good[-64:]):
                        wrong = (reader.lookup(TABLE, self._bad) != self._good).any(axis=1)
                        restored_s[name] = 0.0 if wrong.any() else time.monotonic() - begin_s
                assert time.monotonic() - begin_s < WAIT_S_MAX, restored_s
                time.sleep(0.002)
            for reader in readers.values():
                reader.close()
            history = self._until_over(asked)
            back_s = self._writers_back(publisher, begin_s)
        wrong_rows = sum(int((self._values(name) != self._good).any(axis=1).sum()) for name in self._cluster.nodes)
        return {
            "restore_s": max(restored_s.values()),
            "writers_back_s": back_s,
            **{f"{phase}_s": history["took_ms"][phase] / 1_000 for phase in PHASES},
            "rows": history["rows"],
            "bytes": history["payload_bytes"],
            "rows_wrong": wrong_rows,
        }

    def _ask(self, moment_ms: int) -> str:
        body = {"model": MODEL, "to_ms": moment_ms, "tables": [], "writer": "", "keys": None}
        status, answer = self._node("witness").post("/rollback", body)
        assert status == 200, answer
        return str(json.loads(answer)["epoch"])

    def _node(self, name: str) -> NodeProcess:
        return self._cluster[name]

    def _until_over(self, epoch: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def over() -> bool:
            found.update(self._node("witness").get(f"/rollback?epoch={epoch}")["rollbacks"][0])
            if found["step"] == "probing":  # nobody judges here: an operator says that it is well
                self._node("witness").post("/rollback", {"model": MODEL, "finish": True})
            return bool(found["over"])

        wait_until(over, "the rollback is over", WAIT_S_MAX)
        assert found["step"] == "done", found
        return found

    def _writers_back(self, publisher: ekko.Publisher, begin_s: float) -> float:
        """When a publisher may go on, with a row that is no part of this."""
        while time.monotonic() - begin_s < WAIT_S_MAX:
            with suppress(EkkoError):
                publisher.restored()
                publisher.publish(TABLE, np.array([self._rows + 1], np.uint64), np.zeros((1, DIM), np.float32))
                return time.monotonic() - begin_s
            time.sleep(0.01)
        raise EkkoError("writers were not let go on")

    def reload(self) -> tuple[bool, float, int]:
        """Both serving nodes lose their memory and get everything again.

        Returns:
            Whether they had all of it after at most `RELOAD_S_MAX`; the seconds that it took; rows of the one that has fewer.
        """
        nodes = [self._cluster[name] for name in SERVING]
        for node in nodes:
            node.kill()
            node.remove_memory()
        for node in nodes:
            node.start()

        def listening() -> bool:
            with suppress(NodeProcessError, KeyError):
                return all(node.status()["peers"] is not None for node in nodes)
            return False

        wait_until(listening, "the serving nodes listen", 120)
        begin_s, ended = time.monotonic(), False
        with suppress(NodeProcessError):
            for node in nodes:
                node.wait_ready(max(1.0, begin_s + RELOAD_S_MAX - time.monotonic()))
            ended = True
        seconds = time.monotonic() - begin_s
        for node in nodes:
            assert node.running, node.log_tail()
        rows = min(int(node.status()["models"][MODEL]["rows"]) for node in nodes)
        return ended, seconds, rows
