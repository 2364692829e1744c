"""Training goes on through kills of servers, nodes, workers and the trainer; `scripts/server-kills` does many rounds of it."""

from pathlib import Path

import pytest

from tests.ekko import server_kills

pytestmark = pytest.mark.processes


def test_training_goes_on_through_kills_and_every_batch_counts_once(tmp_path: Path) -> None:
    retries = server_kills.run(tmp_path, 3, ["server", "worker", "expelled", "trainer"])
    assert retries > 0, "the kills went unnoticed"
