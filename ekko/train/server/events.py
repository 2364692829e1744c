"""What goes into a model's machine and what comes out of it. The shell turns messages and facts into events, calls
`Machine.handle(event, now_ms)`, and carries out the effects that come back, in their order.

`ask` numbers a request: an int that the shell chooses, never twice in one life. Every ask gets exactly one `Answer` or
`AnswerPull`. What a push brought stays with the shell under its ask until `Discard(ask)`.

An effect that does work (`Apply`, `AwaitDurable`, `Serve`, `Load`, `Flush`) is answered by exactly one event, when it is done.
None of them may fail: the shell repeats what it does until it is done; if it cannot, the server process ends and starts anew.
"""

from ekko.train.server.wire import Answer as WireAnswer
from ekko.train.server.wire import ServerLife
from p2p.values import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """What is stored of a worker in a partition, as a row of that partition in the table of marks, in the same step as the rows
    that a push changed: number of the last push that counts, and the worker's life. The row's key is one that belongs to the
    partition, so that both are in one keyspace and arrive together.
    """

    partition: int
    worker: int
    life: int
    number: int


@dataclass(frozen=True, slots=True)
class NodeLife:
    """What our node knows of the node of a server: its latest life.

    `holds`: which partitions of the training model it holds. `expelled`: that life was expelled. `gone`: it was, the writers it
    had are retired, and all that any member still had of them is in our node's memory, so that nothing more of it will arrive.
    """

    node: str
    boot_ms: int
    boot: int
    holds: frozenset[int]
    expelled: bool = False
    gone: bool = False


# --- events -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HelloAsked:
    """`wire.Hello` came."""

    ask: int
    worker: int
    life: int


@dataclass(frozen=True, slots=True)
class PullAsked:
    """`wire.Pull` came, its tables and dims checked. `bytes`: of its keys, and of the rows that they come to."""

    ask: int
    worker: int
    life: int
    clock: int
    partitions: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class PushAsked:
    """`wire.Push` came; tables, dims and partitions of keys are checked, gradients and rate are finite. The shell keeps its
    columns under `ask`. `bytes`: what its rows and their optimiser state may take at most in one step, keys included.
    """

    ask: int
    worker: int
    life: int
    number: int
    partitions: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """`wire.Release` came, and its digest is ours."""

    ask: int
    asker: ServerLife
    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReleaseAnswered:
    """`wire.Released` came."""

    by: str
    asker: ServerLife
    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """What our node knows now of the nodes of all servers that it ever heard of, our own included.

    The first one comes before any other event, and once our node has joined (is ready): so it tells of every life that was
    there before this one. Before it, what the process before us has on record (see `Apply`) is published as it was: later,
    somebody else may act for those partitions, since we release what we do not act for.
    """

    lives: tuple[NodeLife, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """`Load` is done. `marks`: all that are stored of these partitions."""

    partitions: tuple[int, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """`Apply` is done: the step is in our node's memory, and any look-up from now on sees it."""

    group: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Durable:
    """`AwaitDurable` is done."""

    group: int


@dataclass(frozen=True, slots=True)
class Served:
    """`Serve` is done."""

    group: int


@dataclass(frozen=True, slots=True)
class Flushed:
    """`Flush` is done."""

    flush: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    """`Machine.deadline_ms` has come, or about so."""


Event = (
    HelloAsked
    | PullAsked
    | PushAsked
    | ReleaseAsked
    | ReleaseAnswered
    | ViewChanged
    | Loaded
    | Applied
    | Durable
    | Served
    | Flushed
    | TimerFired
)

# --- effects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Send this answer to who asked. Best effort: who does not get it asks again."""

    ask: int
    answer: WireAnswer


@dataclass(frozen=True, slots=True)
class AnswerPull:
    """Look the pull's keys up in our node's memory, before any effect that follows is begun; answer with `wire.Pulled`."""

    ask: int
    clock: int


@dataclass(frozen=True, slots=True)
class Discard:
    """What the push brought is not needed any more. Its answer may still be to come."""

    ask: int


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step in these partitions, over the keys of these pushes that belong to them.

    `asks`: pushes, in the order in which they count. `summed`: gradients of equal keys are added up in this order over all
    pushes, and the optimiser runs once (mode "sync"). Else it runs once for each push, in order, on what the one before left.
    """

    partitions: tuple[int, ...]
    asks: tuple[int, ...]
    summed: bool


@dataclass(frozen=True, slots=True)
class Apply:
    """Carry these steps out, one after another, and publish all rows, all optimiser state and the marks as ONE step of the
    training model, locally. Answered with `Applied`. Never more than one is under way or waits to be durable.

    The arithmetic happens once: a publish without an answer is repeated with the same rows. So that a crash in the middle
    leaves nothing half done, the rows and marks as they were are on record (in `run_dir`) before the publish, and taken off
    the record before `Durable` is reported.

    `steps` may be empty: then only marks are published.
    """

    group: int
    steps: tuple[Step, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class AwaitDurable:
    """Wait until every node that holds a partition of the group has its step, who is silent included, who left or is expelled
    excluded; with `ack = "local"` who is silent is excluded, too. Answered with `Durable`.
    """

    group: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Publish the newest weights of all rows that this group and earlier ones changed to the served model, unless they are
    there. Answered with `Served`. Comes after `Durable`; at most one is under way, and what became due meanwhile is one.
    """

    group: int


@dataclass(frozen=True, slots=True)
class Load:
    """Get ready to act for these partitions. Answered with `Loaded`.

    In this order: all that our node has of these partitions is at every other holder (as in `AwaitDurable`); then the marks are
    read. Nothing else is applied in these partitions meanwhile.
    """

    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reconcile:
    """From now on, beside everything else, publish to the served model what it lacks of these partitions: rows whose training
    stamp is newer than the served row's, or that are not served. Not answered; given up when an `Unload` names the partition.
    """

    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unload:
    """We do not act for these partitions any more, and nothing of them is under way."""

    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Flush:
    """See to it that this node has all that ours has of these partitions. Answered with `Flushed`."""

    flush: int
    partitions: tuple[int, ...]
    node: str


@dataclass(frozen=True, slots=True)
class AskRelease:
    """Send `wire.Release` to the server beside this node. Best effort: it is repeated."""

    node: str
    asker: ServerLife
    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerDropped:
    """For the log: nothing came from this worker for `worker_timeout_ms`, and these partitions do not wait for it any more."""

    worker: int
    partitions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Our life was expelled: the server process ends without another write, and starts anew once its node has joined again."""

    reason: str


Effect = (
    Answer
    | AnswerPull
    | Discard
    | Apply
    | AwaitDurable
    | Serve
    | Load
    | Reconcile
    | Unload
    | Flush
    | AskRelease
    | WorkerDropped
    | Stop
)
