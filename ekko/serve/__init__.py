"""The serving side: look-ups from shared memory, without a network."""
