"""Real nodes: what one dropped for want of memory comes back by key when its readers ask for it, and whole with more memory."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import ekko
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import Store
from p2p.replica import RowColumns
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until
from tests.ekko.settled import WITHIN_S, everywhere

pytestmark = pytest.mark.processes
DIM = 16
FIRST = 4_000  # rows that find room
COUNT = 6_000
CAPACITY_ROWS = 1_000


def bytes_of(rows: int) -> int:
    """Of a model with so many of them."""
    model = Store.anonymous().add_model(ModelSpec("ctr", 64, {"item": TableSpec("item", DIM)}), CAPACITY_ROWS)
    keys = np.arange(rows, dtype=np.uint64)
    model.apply([RowColumns(table_id("item"), keys, np.zeros((rows, 4 * DIM), np.uint8))], 1 << 12)
    return model.memory_bytes


def allow(node: NodeProcess, size: int) -> None:
    """Let the model have so many bytes, from the next start on."""
    text = "\n".join(line for line in node.config_path.read_text().splitlines() if not line.startswith("capacity_bytes"))
    node.config_path.write_text(text.replace('[models."ctr"]', f'[models."ctr"]\ncapacity_bytes = {size}'))


@pytest.mark.long
def test_rows_that_readers_ask_for_come_back_and_all_do_with_more_memory(tmp_path: Path) -> None:
    nodes = [NodeSpec("train-1", "us", "train"), NodeSpec("serve-1", "eu")]
    with LocalCluster(tmp_path, nodes, models={"ctr": ModelTables({"item": DIM}, capacity_rows=CAPACITY_ROWS)}) as cluster:
        serve = cluster["serve-1"]
        allow(serve, bytes_of(FIRST))
        cluster.start()
        keys = np.arange(COUNT, dtype=np.uint64)
        rows = np.repeat(keys.astype(np.float32)[:, None] + 1, DIM, axis=1)
        with ekko.Publisher(cluster["train-1"].local, model="ctr") as publisher:
            for part in np.split(keys, 6):
                stamp = publisher.publish("item", part, rows[part.astype(np.int64)])
            everywhere(publisher, stamp)
        model = serve.status()["models"]["ctr"]
        assert model["rows"] == FIRST
        assert model["incomplete_shards"] > 0
        serve.stop()
        allow(serve, bytes_of(FIRST + 200))
        serve.start()
        serve.wait_ready()
        asked = keys[-64:]
        with closing(ekko.Reader("ctr", run_dir=serve.run_dir, wait=WITHIN_S)) as reader:
            assert not reader.lookup("item", asked).any()

            def back() -> bool:
                found = [reader.lookup("item", asked) for _ in range(2_000)][-1]
                return bool((found == rows[-64:]).all())

            wait_until(back, "they come back", WITHIN_S)
            assert serve.status()["counters"]["rows_fetched"] == 64
            found = reader.lookup("item", keys)
            held = found.any(axis=1)
            assert held.sum() == FIRST + 64
            assert (found[held] == rows[held]).all()
            serve.stop()
            allow(serve, 1 << 30)
            serve.start()
            assert (reader.lookup("item", keys)[held] == rows[held]).all()  # they are there all the time
            serve.wait_ready()
            assert (reader.lookup("item", keys) == rows).all()
            assert serve.status()["models"]["ctr"]["incomplete_shards"] == 0
