"""What workers and servers say to each other: requests, answers, and the limits on each. `coding` has the bytes.

A worker holds a DEALER socket to each server, a server one ROUTER. A message is a msgpack header and then raw columns, which
are not copied. Each request has a number, which comes back in its answer; answers may come in any order, and a request whose
answer does not come is sent again, to the same server or another: every request may safely come twice.

How a worker gets along, in order:

1. `WhoServes` to any server: `Serving` says which server is primary of each partition. A key belongs to partition
   `mix64(key) mod shards mod partitions`, as `ekko.Reader.partition_of` has it.
2. `Hello` to each server that is primary of something: `Welcome` says the number of this worker's last push in each partition.
3. Pushes are numbered 1, 2, 3, ... by each worker, over all its lives. Push `n` goes to every primary, with the keys of its
   partitions, and with none where there are none, since the number is the worker's clock. A worker that starts, or starts
   again, goes on with the smallest last number that any partition told it, plus one; where a partition has the number already,
   it is answered and not applied again.
4. Before step `n + 1` it pulls with `clock = n`. In mode "sync" (staleness 0) and "bounded" the answer comes when all workers'
   clocks have reached `n - staleness` in all partitions of the pull; in mode "async" at once.
5. `NotPrimary` says who is, and nothing happened: the push or pull is divided anew and sent there, under the same push number.
   `Failed` says why not and nothing happened; what to do is said beside its kinds.
"""

from dataclasses import field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ekko.errors import EkkoError
from p2p.values import dataclass

U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

SERVER_PROTOCOL_VERSION: Final = 1
# One pull's answer or one push. 4,096 keys of dim 64 are a MiB; a larger batch is several messages, which also overlap better.
MESSAGE_BYTES_MAX: Final = 64 << 20
# A header names tables and at most `PARTITIONS_MAX` servers with their addresses.
HEADER_BYTES_MAX: Final = 256 << 10
TABLES_MAX: Final = 256  # of one message
FRAMES_MAX: Final = 1 + 2 * TABLES_MAX
KEYS_MAX: Final = 1 << 20  # of one message, over all its tables
WORKERS_MAX: Final = 1_024
SERVERS_MAX: Final = 64
PARTITIONS_MAX: Final = 64  # as `p2p.replica.PARTITIONS_MAX`
DIM_MAX: Final = 16_384
SHARDS_MAX: Final = 65_536
STALENESS_MAX: Final = 1 << 20
NAME_BYTES_MAX: Final = 100
ADDRESS_BYTES_MAX: Final = 256
REASON_BYTES_MAX: Final = 2_000
NUMBER_MAX: Final = (1 << 63) - 1  # pushes, clocks: what is computed with must stay inside a signed 64-bit number

# Who pulls under this number is no worker: nobody waits for it, and it waits for nobody. It cannot push.
OBSERVER: Final = -1

ASYNC: Final = "async"
BOUNDED: Final = "bounded"
SYNC: Final = "sync"
MODES: Final = (ASYNC, BOUNDED, SYNC)

# --- kinds of `Failed`: nothing happened, and what the client does about it ---

# Too much waits on the server, or it is about to act for a partition and does not yet: the same again in a moment.
BUSY: Final = "busy"
# The push's number is not the next one: an earlier one was refused. Send again from the first push without an answer.
GAP: Final = "gap"
# The server does not know this life of the worker: `Hello`, then the same again.
HELLO: Final = "hello"
# The worker was silent for so long that the others went on without it. What it pushed and has no answer to may be lost, so this
# life is over: it says `Hello` with a later one, and goes on as that tells it. If it went on in this one, a push that it sends
# again could be taken for one that counts already, since its numbers go on where the others are.
DROPPED: Final = "dropped"
# A later life of this worker is known: this process has been replaced, and ends. The reason ends in that life.
STALE: Final = "stale"
# Both sides are configured differently, or a model, table or dim is unknown: for a person.
SETTINGS: Final = "settings"
# What was sent can never be taken: not finite, keys of a partition that the push does not name, an observer's push.
REFUSED: Final = "refused"
KINDS: Final = (BUSY, GAP, HELLO, DROPPED, STALE, SETTINGS, REFUSED)


class ServerWireError(EkkoError):
    """Bytes are not a message of this protocol. `number`: of the request or answer, where that much was understood."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.number = number


# --- parts of messages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerLife:
    """One life of one server process. Of two lives of a node the one with the larger (boot_ms, boot) is the later one.

    `node`, `boot_ms`, `boot`: the node's id and the life of the node beside it, as its member record says: what expulsions
    name. `server`: a random 64-bit nonce of the server process, since it may start again beside a node that goes on.
    """

    node: str
    boot_ms: int
    boot: int
    server: int


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What all servers of a model and its workers must agree on. `digest`: uint64 of these and of optimisers, initialisers,
    admission and expiry, which workers need not know.
    """

    partitions: int
    shards: int
    mode: str  # of `MODES`
    workers: int  # how many there are, numbered from 0; 0 in mode "async": as many as come
    staleness: int  # in mode "bounded"; in "sync" 0
    tables: dict[str, int]  # name -> dim
    digest: int


@dataclass(frozen=True, slots=True)
class Serving:
    """Who serves what, as far as the answering server knows. Two may differ for a moment: who does not act, refuses."""

    servers: tuple[tuple[str, str], ...]  # (node, endpoint) of all servers of the model
    primaries: tuple[int, ...]  # for each partition an index into `servers`


# --- requests -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WhoServes:
    """Answered with `Serving`, by any server, whether it acts for anything or not."""

    model: str


@dataclass(frozen=True, slots=True)
class Hello:
    """Worker `worker` begins a life, or shows that it lives. Answered with `Welcome`, once the life is known for good.

    `life`: uint63, larger than that of every life before: Unix microseconds at its start do. A later life shuts the former out.
    `Failed(STALE)` ends in the largest life known; who has just started, knows that he is the latest, and has a clock that was
    set back takes that plus one.
    """

    model: str
    worker: int
    life: int


@dataclass(frozen=True, slots=True, eq=False)
class Pull:
    """Rows of these keys. Answered with `Pulled`. Keys of one table may come twice; all belong to `partitions`.

    `clock`: the number of the last push of this worker before the pull; 0 before the first. `worker` may be `OBSERVER`, then
    `life` and `clock` are 0.
    """

    model: str
    worker: int
    life: int
    clock: int
    partitions: tuple[int, ...]  # ascending, not empty; of all keys, and of no others
    tables: dict[str, U64]  # name -> uint64[n]


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """Gradients of one step of one worker. Answered with `Pushed` when no holder of a partition can lose them any more.

    `partitions`: those for which this is the whole of push `number`; a later message may bring it for others. Keys may come
    twice, their gradients are added up. `rate`: the learning rate of this step; NaN: that of the server's settings.
    """

    model: str
    worker: int
    life: int
    number: int  # 1 and on
    partitions: tuple[int, ...]  # ascending, not empty; of all keys, and also those of which there is none
    tables: dict[str, tuple[U64, F32]]  # name -> uint64[n], float32[n, dim]
    rate: float = float("nan")


@dataclass(frozen=True, slots=True)
class Release:
    """From server to server: let me act for these partitions. Answered with `Released`. `digest`: `schema.digest_of`."""

    model: str
    asker: ServerLife
    partitions: tuple[int, ...]
    digest: int


Request = WhoServes | Hello | Pull | Push | Release

# --- answers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """`last`: for each partition the number of this worker's last push that counts there; -1: the server is not its primary.

    It is larger than any that the worker sent if the worker had been dropped for its silence: it goes on where the others are.
    """

    settings: ModelSettings
    serving: Serving
    last: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """Rows in the order of the pull's keys: those of absent keys as the table's initialiser has them.

    `clock`: the smallest clock of all workers in the partitions of the pull; what they pushed up to there is in the rows.
    """

    tables: dict[str, F32] = field(default_factory=dict)  # name -> float32[n, dim], for each table of the pull
    clock: int = 0


@dataclass(frozen=True, slots=True)
class Pushed:
    """The push is applied in all its partitions, once, and every holder has it. `stamp`: of the last step that it is in; 0: it
    was applied before, in a step that this server does not remember.
    """

    number: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Released:
    """The sender does not act for these partitions, nor will it while this life of the asker is not expelled, and the asker's
    node has all rows of them that the sender's has. May name fewer than were asked for, or none: ask again in a moment.
    """

    by: str  # node
    asker: ServerLife  # as in the request
    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NotPrimary:
    """The server does not act for one of the partitions. Nothing happened."""

    serving: Serving


@dataclass(frozen=True, slots=True)
class Failed:
    """The request was refused. Nothing happened. `kind`: of `KINDS`; one that is not known counts as `REFUSED`."""

    kind: str
    reason: str


Answer = Serving | Welcome | Pulled | Pushed | Released | NotPrimary | Failed
