"""Writer ids in blocks, expulsions, retirements (`p2p.identity`), since protocol version 2. `p2p.messages.fences`: fences."""

from dataclasses import field

from p2p.messages.envelope import NodeId
from p2p.messages.fences import Fence
from p2p.messages.rows import no_numbers
from p2p.replica import U64
from p2p.values import dataclass


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Give me writer ids (R12)."""

    cluster: int  # as in `Hello`
    holder: int  # nonce of the asker's ledger
    held: tuple[int, ...]  # blocks that it has


@dataclass(frozen=True, slots=True)
class BlockGrant:
    """These blocks of writer ids are yours, and no longer mine; none when I have none to spare."""

    cluster: int
    holder: int
    blocks: tuple[int, ...]
    clock_floor: int  # the newest stamp that the sender has seen: new writers write above it (R5)
    founded: bool  # whether the sender knows that the cluster's ids are in blocks


# Stages of a writer's retirement (R13), see `p2p.identity.retirement`.
FROZEN, FLOORED, DONE = range(3)


@dataclass(frozen=True, slots=True)
class Expulsion:
    """A life of a node that is no member any more, for ever."""

    node: NodeId
    boot: int
    boot_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class Retired:
    """How far the retirement of a writer has come in one keyspace."""

    keyspace: int
    family: int
    writer: int
    nonce: int
    stage: int
    floor: U64 = field(default_factory=no_numbers)  # [shards] from stage `FLOORED` on: all that there is of it; empty before

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it apart from others."""
        return self.keyspace, self.writer, self.nonce


@dataclass(frozen=True, slots=True, eq=False)
class Retirements:
    """Who was expelled, which writers are retired, and which families are fenced: some of it, or all."""

    expulsions: tuple[Expulsion, ...]
    retired: tuple[Retired, ...]
    fences: tuple[Fence, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RetireReport:
    """What the sender holds of a writer at this stage of its retirement; it takes nothing more of it."""

    keyspace: int
    writer: int
    nonce: int
    stage: int
    column: U64  # [shards]
