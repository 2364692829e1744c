"""A few of the kills that `scripts/kills` does by the hundred; and two bugs that they notice."""

from pathlib import Path

import numpy as np
import pytest

from ekko.store.images import KnowledgeImage, ModelImage
from tests.ekko.snapshots import kills


@pytest.mark.processes
def test_every_restart_is_exact(tmp_path: Path) -> None:
    seen = kills.run(6, 10, tmp_path)
    assert all((seen.attached, seen.restored, seen.gone, seen.slots_reused)), f"the kills met too little: {seen}"


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
        kills.run(12, 10, tmp_path)
