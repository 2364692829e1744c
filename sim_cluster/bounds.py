"""Bounds of the protocol and the store, made so small for a run that they are met all the time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

from ekko.store import collecting, eviction, fetching, recent
from p2p import knowledge, reach, status, wire
from p2p.busy import state_mode
from p2p.link import links
from p2p.paper import round_answers
from p2p.pulling import outbox, pull, pull_answers
from p2p.pushing import push

SMALL_RING: Final = 16  # changes; tables of a swarm have some hundred rows
EXPIRED_MS: Final = 1_000


@contextmanager
def small_messages(bytes_max: int) -> Iterator[None]:
    """Batches and chunks are cut at so many bytes meanwhile, so that parts and chunks are many, and update caches begin small,
    so that they forget; 0: as in production.
    """
    changes: tuple[tuple[ModuleType, str, int], ...] = (
        (wire, "BATCH_BYTES_MAX", bytes_max),
        (outbox, "CHUNK_BYTES_MAX", bytes_max),
        (state_mode, "CHUNK_BYTES_MAX", bytes_max),
        (recent, "RING_START", SMALL_RING),
        (recent, "WINDOW_MIN", 2 * SMALL_RING),
        (recent, "WINDOW_START", 4 * SMALL_RING),
    )
    with _changed(changes if bytes_max else ()):
        yield


@contextmanager
def short_queues(wanted: bool) -> Iterator[None]:
    """Bounds of the protocol are so low meanwhile that they are met all the time: what does not fit must be repaired."""
    changes: tuple[tuple[ModuleType, str, int], ...] = (
        (knowledge, "OPEN_STEPS_MAX", 8),
        (links, "CREDIT_MESSAGES_MAX", 16),
        (links, "CREDIT_BYTES_MAX", 8_000),
        (push, "SHORT_BYTES_MAX", 2_000),
        (push, "SEEN_MAX", 32),
        (reach, "WAITS_MAX", 2),
        (reach, "QUESTIONS_MAX", 2),
        # Those that other modules have under the same name.
        (status, "OPEN_STEPS_MAX", 8),
        *((module, "STREAMS_MAX", 1) for module in (outbox, pull, pull_answers, round_answers, status)),
    )
    with _changed(changes if wanted else ()):
        yield


@contextmanager
def little_credit(wanted: bool) -> Iterator[None]:
    """Links have credit for some steps, so that what is narrower than what is written shows within a second."""
    changes: tuple[tuple[ModuleType, str, int], ...] = (
        (links, "CREDIT_BYTES_MAX", 8_000),
        (push, "SHORT_BYTES_MAX", 2_000),
        (state_mode, "CHUNK_BYTES_MAX", 2_000),
    )
    with _changed(changes if wanted else ()):
        yield


@contextmanager
def soon_expired(wanted: bool) -> Iterator[None]:
    """Rows that expired by the clock of a node go for good soon after, and not only when the clocks of all would agree."""
    with _changed(((collecting, "AHEAD_MS_MAX", EXPIRED_MS),) if wanted else ()):
        yield


@contextmanager
def quick_evictions(wanted: bool) -> Iterator[None]:
    """Rows are old enough to be evicted, and keys may be asked for again, after a moment."""
    with _changed(((eviction, "QUIET_MS", 500), (fetching, "ASKED_AGAIN_S", 1)) if wanted else ()):
        yield


@contextmanager
def _changed(changes: Iterable[tuple[ModuleType, str, int]]) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)
