"""Bytes of answers that were handed to ZeroMQ and have not left, by client.

A client that does not read, since its machine is stopped or its network is slow, would otherwise have the server keep all rows
that it asks for.
"""

from collections import deque
from typing import Final, Protocol

# Clients that are remembered before those that have taken everything are forgotten.
CLIENTS_MAX: Final = 1_024


class Tracker(Protocol):
    """`zmq.MessageTracker` is one."""

    @property
    def done(self) -> bool: ...


class Unsent:
    """Those of one endpoint."""

    def __init__(self) -> None:
        self._answers: dict[bytes, deque[tuple[Tracker, int]]] = {}

    def add(self, client: bytes, tracker: Tracker, size: int) -> None:
        """An answer of so many bytes is on its way."""
        if len(self._answers) >= CLIENTS_MAX:
            for other in list(self._answers):
                self.bytes_of(other)
        self._answers.setdefault(client, deque()).append((tracker, size))

    def bytes_of(self, client: bytes) -> int:
        """What of the answers to a client has not left."""
        answers = self._answers.get(client)
        if answers is None:
            return 0
        while answers and answers[0][0].done:  # they leave in their order
            answers.popleft()
        if not answers:
            del self._answers[client]
        return sum(size for _, size in answers)
