"""A few of the kills that `scripts/kills` does by the hundred; and two bugs that they notice."""

from pathlib import Path

import numpy as np
import pytest

from ekko.store.images import KnowledgeImage, ModelImage
from tests.ekko.snapshots import kills


@pytest.mark.processes
def test_every_restart_is_exact(tmp_path: Path) -> None:
    for rounds in (12, 40, 120):  # on a busy machine few snapshots are whole when the kill comes
        (tmp_path / str(rounds)).mkdir()
        seen = kills.run(rounds, 4, tmp_path / str(rounds))
        if all((seen.attached, seen.restored, seen.gone, seen.slots_reused)):
            return
    pytest.fail(f"the kills met too little: {seen}")


@pytest.mark.processes
def test_a_vector_that_is_read_after_the_rows_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kills would find a snapshot that claims too much."""
    knowledge = ModelImage.knowledge

    def too_much(self: ModelImage) -> KnowledgeImage:
        known = knowledge(self)
        vector = np.where(known.vector.any(axis=1, keepdims=True), known.vector + np.uint64(400 << 12), known.vector)
        return KnowledgeImage(vector, known.frontiers)

    monkeypatch.setattr(ModelImage, "knowledge", too_much)
    with pytest.raises(AssertionError, match="is claimed, and is"):
        kills.run(400, 4, tmp_path)  # until it is noticed: on a busy machine few snapshots are whole when the kill comes
