"""How long a rollback is said to take goes by the rates that count: an operator's word before the node's file."""

from pathlib import Path

import pytest

from ekko.config import load_config
from ekko.node.parts import _make_machine
from ekko.node.rollbacks import AGREEING_MS, RATE_GUESS_BYTES_PER_MS, NodeRollbacks
from ekko.rates import Rates, Word
from ekko.store import Store

NODE = """
[node]
id = "wit-1"
region = "eu"
role = "witness"
run_dir = "{run_dir}"
peers = "tcp://127.0.0.1:7800"
local = "tcp://127.0.0.1:7700"
http = "127.0.0.1:7900"

[links]
"eu/us" = {{ rate_mbps = 80 }}
"ap/us" = {{ rate_mbps = 1 }}
"""


@pytest.mark.parametrize(
    ("word", "bytes_per_ms"), [("configured", 10_000), (8.0, 1_000), ("none", RATE_GUESS_BYTES_PER_MS), (None, 10_000)]
)
def test_an_estimate_goes_by_the_narrowest_link_of_the_region(tmp_path: Path, word: Word | None, bytes_per_ms: int) -> None:
    file = tmp_path / "node.toml"
    file.write_text(NODE.format(run_dir=tmp_path / "run"))
    config, store = load_config(file), Store.anonymous()
    config.node.run_dir.mkdir()
    machine = _make_machine(config, store, 1, 1)
    rollbacks = NodeRollbacks(config, store, machine, lambda event: None, None)
    if word is not None:
        store.facts.note(Rates().said("eu/us", word, 1))
    assert rollbacks._estimate_ms(6_000_000) == AGREEING_MS + 6_000_000 // bytes_per_ms
