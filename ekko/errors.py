"""Errors a user of ekko can meet. Each message says what was wrong, what was expected and what to do."""

from p2p.errors import FullError


class EkkoError(Exception):
    """Base of every error that ekko raises for a user's mistake or a failing environment."""


class ConfigError(EkkoError):
    """A setting is missing, malformed, contradictory or not available in this version."""


class StoreError(EkkoError):
    """The shared-memory store cannot do what was asked: no space, damaged, or a row that never settles."""


class MemoryFullError(StoreError, FullError):
    """Shared memory has no room for what was asked for; the message says what to enlarge. To the protocol a `FullError`."""


class SnapshotError(StoreError):
    """A snapshot cannot be written, or cannot be used: damaged, foreign, or of a newer version."""


class ModelError(EkkoError):
    """An unknown model or table, or data that does not fit its table."""


class SinkError(EkkoError):
    """A foreign store cannot be reached, or is not as it was left: the feed opens it again and goes on from its cursor."""


class SinkTakenError(EkkoError):
    """Another feed writes into a foreign store by now, so that this one must end."""


class WorkerDropped(ModelError):  # noqa: N818 - like the ones below
    """Parameter servers went on without a worker that was silent for too long: `Client.rejoin` lets it go on with them."""


class PublishError(EkkoError):
    """A batch was refused; nothing of it was published."""


class NodeUnreachable(EkkoError):  # noqa: N818 - the name is part of the contract
    """No node answers at the given address."""


class NodeFailed(EkkoError):  # noqa: N818 - like the one above
    """A node stopped by itself, because going on would break an invariant; the reason says what to do."""
