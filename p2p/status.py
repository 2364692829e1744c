"""What an operator may ask of a running node's protocol; read-only pictures of the machine's state."""

from dataclasses import dataclass

from p2p import messages as m
from p2p import reach, wire
from p2p.busy import backlog
from p2p.busy.backlog import mode_of
from p2p.collection import Collection
from p2p.core import Core, Keyspace
from p2p.identity import retirement
from p2p.identity.ledger import FENCES_MAX
from p2p.knowledge import OPEN_STEPS_MAX
from p2p.link import links
from p2p.members import membership
from p2p.paper import round_answers
from p2p.paper.rounds import LISTS_MAX
from p2p.pulling.outbox import STREAMS_MAX
from p2p.pulling.pull import Pull
from p2p.pulling.pull_answers import HELD_MAX
from p2p.pushing import groups, push
from p2p.pushing.adoption import ENTRIES_MAX
from p2p.pushing.push import Push
from p2p.pushing.waiting import WAITING_CREDITS_MAX, WAITING_MESSAGES_MAX
from p2p.reach import Reach
from p2p.stamps import unix_ms_of


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One other node, as this one sees it."""

    node: str
    region: str
    role: str
    address: str
    alive: bool
    in_trees: bool  # batches go through it; not while it hears nobody, or after it came and went too often
    linked: bool
    bytes_in_flight: int
    credit_bytes: int  # that may be; where no rate is set, what the path takes within a moment (`p2p.link.window`)
    no_credit: str  # why nothing may be sent now; empty where something may
    round_trip_ms: int | None  # the shortest of late; None: not known, or a rate is set
    path_bytes_per_s: float | None  # what the path was found to take, where it is narrow
    rows_in: int
    rows_out: int
    bytes_in: int
    bytes_out: int
    batches_skipped: int
    sessions_broken: int
    rows_due: int  # in answers to its pulls
    mode: str  # of the link: "pass-through", or "state" (`p2p.busy.backlog`)
    mode_ms: int  # for how long it has been in state mode
    backlog_rows: int  # due, and not sent
    backlog_bytes: int
    oldest_ms: dict[str, int]  # by band of classes: how long the oldest row has been due
    bytes_saved: int  # by sending rows once that changed several times
    protocol_version: int
    holds: tuple[m.Holding, ...]  # of families of several partitions


@dataclass(frozen=True, slots=True)
class KeyspaceStatus:
    """One keyspace on this node."""

    keyspace: int
    synced: bool
    synced_until_ms: int  # Unix; 0: no live writer is known
    open_steps: int
    steps_dropped: int
    pulling_from: str
    writers: tuple[m.WriterRecord, ...]
    collectable: int  # tombstones of its model, and rows of tables with a ttl
    collection_held_up_by: tuple[str, ...]  # members that have not said that they know of what was deleted
    held_up_ms: int  # for how long
    full_ms: int | None  # for how long rows have been lacking for which memory had no room; None: none are


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """What updates to another region may use."""

    region: str
    bytes_per_s: float  # of all nodes here together
    share_bytes_per_s: float  # of that ours
    bytes_charged: int
    waits: int  # how often something found no tokens


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """A bounded queue's fill."""

    name: str
    fill: int
    bound: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """Everything an operator may ask of the protocol."""

    node: str
    region: str
    role: str
    boot: int
    cluster: int
    synced: bool
    peers: tuple[PeerStatus, ...]
    keyspaces: tuple[KeyspaceStatus, ...]
    queues: tuple[QueueStatus, ...]
    protocol_version: int
    writer_blocks: int  # of writer ids, that are ours
    ids_wanted: str  # why this training node has no writer id to use; empty when it has
    fences: tuple[m.Fence, ...]  # the last one of each family that had one
    budgets: tuple[BudgetStatus, ...]  # of pairs for which a rate is set


def of_node(
    core: Core,
    pushing: Push,
    pulling: Pull,
    reaching: Reach,
    collecting: Collection,
    introduced: bool,
    ids_wanted: str,
    now: m.Now,
) -> NodeStatus:
    """The whole node; `introduced` tells whether somebody of the cluster has answered it."""
    holding = {holder.node for holder in core.membership.holders(now.monotonic_ms)}
    keyspaces = tuple(_of_keyspace(core, pulling, collecting, keyspace, now) for keyspace in core.keyspaces.values())
    return NodeStatus(
        core.options.node,
        core.options.region,
        core.options.role,
        core.options.boot,
        core.writers.cluster,
        (introduced or core.first) and all(keyspace.synced for keyspace in keyspaces),
        tuple(_of_peer(core, pushing, pulling, node, holding, now) for node in sorted(core.membership.members)),
        keyspaces,
        _of_queues(core, pushing, pulling, reaching, collecting),
        core.options.protocol_version,
        len(core.writers.blocks),
        ids_wanted,
        tuple(core.fences[family] for family in sorted(core.fences)),
        tuple(
            BudgetStatus(region, 1_000 * one.pair_rate, 1_000 * one.rate, one.used, one.waits)
            for region, one in sorted(core.budgets.buckets.items())
        ),
    )


def synced_until(core: Core, keyspace: Keyspace, now: m.Now) -> int:
    """The newest Unix time up to which this node has everything of every live writer; 0 without one."""
    known = keyspace.knowledge.frontier
    oldest = min([int(known[writer]) for writer in core.live_writers(keyspace, now)], default=0)
    # A live writer that has not written, or of which nothing has come, leaves the moment open.
    return unix_ms_of(oldest) if oldest else 0


def _live_writers(core: Core, keyspace: Keyspace, own: m.MemberRecord, now: m.Now) -> tuple[m.WriterRecord, ...]:
    place = keyspace.replica.place
    ours = (writer for writer in own.writers if writer.keyspace == place.family)
    return (*ours, *core.membership.live_writers(now.monotonic_ms, place))


def _of_keyspace(core: Core, pulling: Pull, collecting: Collection, keyspace: Keyspace, now: m.Now) -> KeyspaceStatus:
    number = keyspace.replica.keyspace
    held_up = collecting.held_up(number)
    return KeyspaceStatus(
        number,
        keyspace.synced,
        synced_until(core, keyspace, now),
        keyspace.knowledge.open_steps,
        keyspace.knowledge.dropped,
        pulling.asking.get(number, ""),
        _live_writers(core, keyspace, core.own_record(), now),
        keyspace.replica.collectable,
        () if held_up is None else held_up.nodes,
        0 if held_up is None else now.monotonic_ms - held_up.since_ms,
        None if keyspace.full is None else now.monotonic_ms - keyspace.full.since_ms,
    )


def _of_peer(core: Core, pushing: Push, pulling: Pull, node: str, holding: set[str], now: m.Now) -> PeerStatus:
    record = core.membership.members[node].record
    link = core.links.get(node)
    traffic = link.traffic if link is not None else links.Traffic()
    outbox = pulling.outboxes.get(node)
    backlogs = [] if link is None else list(pushing.state_mode.of_link(link).values())
    mode = mode_of(backlogs, traffic.bytes_saved, now.monotonic_ms)
    return PeerStatus(
        node,
        record.region,
        record.role,
        record.address,
        core.membership.alive(node, now.monotonic_ms),
        node in holding,
        link is not None,
        link.bytes_in_flight if link is not None else 0,
        link.credit_bytes if link is not None else 0,
        link.no_credit_why if link is not None else "",
        link.window.round_trip_ms if link is not None and link.is_measured else None,
        1_000 * link.window.rate if link is not None and link.is_measured and link.window.rate is not None else None,
        traffic.rows_in,
        traffic.rows_out,
        traffic.bytes_in,
        traffic.bytes_out,
        traffic.batches_skipped,
        traffic.sessions_broken,
        outbox.rows_due if outbox is not None else 0,
        mode.mode,
        mode.since_ms,
        mode.rows,
        mode.bytes,
        dict(mode.oldest_ms),
        mode.bytes_saved,
        record.protocol,
        record.holds,
    )


def _of_queues(core: Core, pushing: Push, pulling: Pull, reaching: Reach, collecting: Collection) -> tuple[QueueStatus, ...]:
    open_steps = max((keyspace.knowledge.open_steps for keyspace in core.keyspaces.values()), default=0)
    in_flight = max((link.bytes_in_flight for link in core.links.values()), default=0)
    messages = max((link.messages_in_flight for link in core.links.values()), default=0)
    waiting = max((link.waiting.bytes for link in core.links.values()), default=0)
    lines = max((len(link.waiting) for link in core.links.values()), default=0)
    held = max((len(keyspace.group.steps) for keyspace in core.keyspaces.values()), default=0)
    held_bytes = max((keyspace.group.bytes for keyspace in core.keyspaces.values()), default=0)
    streams = max((len(outbox.streams) for outbox in pulling.outboxes.values()), default=0)
    return (
        QueueStatus("open_steps", open_steps, OPEN_STEPS_MAX),
        QueueStatus("link_bytes_in_flight", in_flight, links.CREDIT_BYTES_MAX),
        QueueStatus("link_messages_in_flight", messages, links.CREDIT_MESSAGES_MAX),
        QueueStatus("link_bytes_waiting", waiting, WAITING_CREDITS_MAX * links.CREDIT_BYTES_MAX),
        QueueStatus("link_messages_waiting", lines, WAITING_MESSAGES_MAX),
        QueueStatus("backlog_rows", pushing.state_mode.rows_max(), backlog.ROWS_MAX),
        QueueStatus("steps_held", held, wire.GROUP_STEPS_MAX),
        QueueStatus("step_bytes_held", held_bytes, groups.bytes_max()),
        QueueStatus("links", max(len(core.links), len(core.by_boot)), membership.MEMBERS_MAX),
        QueueStatus("summaries", pulling.summaries, len(core.keyspaces) * membership.MEMBERS_MAX),
        QueueStatus("pull_streams", streams, STREAMS_MAX),
        QueueStatus("pulls_held", pulling.answers.held, HELD_MAX),
        QueueStatus("rounds_held", pulling.round_answers.held, round_answers.HELD_MAX),
        QueueStatus("children_adopted", pushing.adoption.entries, ENTRIES_MAX),
        QueueStatus("neighbour_lists", pulling.rounds.lists, LISTS_MAX),
        QueueStatus("batches_seen", pushing.seen, push.SEEN_MAX),
        QueueStatus("waits", len(reaching.waits), reach.WAITS_MAX),
        QueueStatus("questions", len(reaching.questions), reach.QUESTIONS_MAX),
        QueueStatus("expelled", len(core.record.expelled), retirement.EXPELLED_MAX),
        QueueStatus("retired_writers", len(core.record.retired), retirement.RETIRED_MAX),
        QueueStatus("fences", len(core.record.fences), FENCES_MAX),
        QueueStatus("retired_floor_bytes", retirement.floor_bytes(core), retirement.FLOOR_BYTES_MAX),
        QueueStatus("stable_reports", collecting.reports, membership.MEMBERS_MAX),
        QueueStatus("members", len(core.membership.members), membership.MEMBERS_MAX),
    )
