"""Every Prometheus name of a node, and the delays behind the most important one.

Counters and gauges are read from the node's picture when they are scraped; only the update delay is recorded as it happens.

The delay of an update is the time from the entry of `publish` to the moment at which the last row of the batch can be read on
this node. Publisher and node on one machine share a monotonic clock, and the delay is exact; between machines it is the
difference of wall clocks, and only as good as their synchronisation.
"""

from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ekko.companions.metrics import server_metrics, sink_metrics
from ekko.device.picture import COUNT_MEANINGS
from ekko.health.verdicts import SEVERITY
from ekko.priority.delays import KINDS, RowDelays
from ekko.status import NodePicture
from p2p.busy.backlog import STATE_MODE
from p2p.messages import BatchApplied, RowsApplied
from p2p.stamps import unix_ms_of

# Exact delays kept for GET /delays: twenty minutes of 100 batches a second.
DELAY_SAMPLES_MAX = 1 << 17
# Delays in one answer. The text is made on the node's event loop: 10,000 take about 4 ms there.
DELAYS_ANSWER_MAX = 10_000
DELAY_BUCKETS_S = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
# Regions a histogram is kept for; more would mean that somebody invents region names.
REGIONS_MAX = 256

UPDATE_DELAY = "ekko_update_delay_seconds"
# Name -> (help, counter of the node). `_total` is added by the format.
COUNTERS = {
    "ekko_batches_published": ("Steps of local publishers that were stored.", "batches_published"),
    "ekko_groups_sent": ("Messages' worth in which those steps left, in each partition.", "groups_sent"),
    "ekko_groups_held": ("Of these, those that waited for further steps.", "groups_held"),
    "ekko_steps_received": ("Steps in the batches that came from peers.", "steps_received"),
    "ekko_batches_received": ("Batches that came from peers.", "batches_received"),
    "ekko_batches_forwarded": ("Batches sent to peers.", "batches_forwarded"),
    "ekko_batches_skipped": ("Batches left to the pull: no credit, no link, or refused by the transport.", "batches_skipped"),
    "ekko_children_handed_over": ("Children of this busy node that were left to other children.", "children_handed_over"),
    "ekko_backlogs_begun": ("Links that went into state mode, since a batch found no credit.", "backlogs_begun"),
    "ekko_backlogs_ended": ("Links on which batches pass through again.", "backlogs_ended"),
    "ekko_backlogs_again": ("Backlogs that were thrown away and selected again.", "backlogs_again"),
    "ekko_backlogs_refused": ("Backlogs that were given up: the other end pulls.", "backlogs_refused"),
    "ekko_backlog_claims": ("Claims made behind rows of a backlog.", "backlog_claims"),
    "ekko_backlog_rows": ("Rows sent in order of priority.", "backlog_rows_sent"),
    "ekko_backlog_bytes_saved": ("Rows that changed again while they were due, in backlogs that ended.", "backlog_bytes_saved"),
    "ekko_feeds_spoiled": ("Backlogs towards this node of which something was not taken.", "feeds_spoiled"),
    "ekko_batches_repeated": ("Batches that had come before.", "batches_repeated"),
    "ekko_rows_written": ("Rows whose version advanced on this node.", "rows_written"),
    "ekko_rows_collected": ("Deleted and expired rows that were dropped for good.", "rows_collected"),
    "ekko_rows_ghosts": ("Late versions of rows that were deleted and dropped for good.", "rows_ghosts"),
    "ekko_rows_dropped": (
        "Rows that were deleted while this node was away.",
        "rows_dropped",
    ),
    "ekko_shards_sent_whole": ("Shards sent whole, to peers that missed what was dropped for good.", "shards_sent_whole"),
    "ekko_rows_stale": ("Rows that were here already in this or a newer version.", "rows_stale"),
    "ekko_gaps": ("Steps that arrived before a predecessor, and were pulled.", "gaps"),
    "ekko_pulls_started": ("Pulls this node asked for.", "pulls_started"),
    "ekko_pulls_completed": ("Pulls whose last chunk was applied.", "pulls_completed"),
    "ekko_pulls_abandoned": ("Pulls given up: the peer went away or its session broke.", "pulls_abandoned"),
    "ekko_pulls_served": ("Pulls of peers that were answered.", "pulls_served"),
    "ekko_pulls_refused": ("Questions of peers that were not answered: too many, or about what is not here.", "pulls_refused"),
    "ekko_credit_overruns": ("Messages dropped, since their sender had no credit for them.", "credit_overruns"),
    "ekko_pull_rows_received": ("Rows that came by pull.", "pull_rows_received"),
    "ekko_pull_rows_sent": ("Rows sent in answer to pulls.", "pull_rows_sent"),
    "ekko_cache_hits": ("Answers about one table that the update cache gave.", "cache_hits"),
    "ekko_cache_misses": ("Answers that took a scan of the table.", "cache_misses"),
    "ekko_cache_pruned": ("Changes dropped from update caches.", "cache_pruned"),
    "ekko_cache_left_out": ("Rows too old to be cached when they came.", "cache_left_out"),
    "ekko_compressed_messages": ("Messages to other regions that were sent compressed.", "compression_messages"),
    "ekko_compressed_bytes": ("Bytes of those before they were compressed.", "compression_bytes_before"),
    "ekko_compression_saved_bytes": ("Bytes less that they were afterwards.", "compression_bytes_saved"),
    "ekko_compressed_in_vain": ("Messages that were compressed, and sent as they were.", "compression_in_vain"),
    "ekko_compression_microseconds": ("Processor time spent on compressing.", "compression_microseconds"),
    "ekko_sessions_broken": ("Link sessions that ended with a hole.", "sessions_broken"),
    "ekko_former_life_messages": ("Messages to a former life of this node, or of a node it does not know.", "strangers"),
    "ekko_peers_refused": ("Nodes that were not let in.", "peers_refused"),
    "ekko_peers_shut_out": ("Times that a peer was not listened to for a while, for junk or a flood.", "peers_shut_out"),
    "ekko_shut_out_messages": ("Messages of peers that were shut out.", "shut_out_messages"),
    "ekko_transport_strangers": ("Connections refused for their key.", "transport_strangers"),
    "ekko_schemas_refused": ("Schemas of peers for which there was no room, at each heartbeat of theirs.", "schemas_refused"),
    "ekko_steps_refused_full": (
        "Steps of publishers here that were refused, since shared memory is full.",
        "steps_refused_full",
    ),
    "ekko_batches_refused_full": (
        "Batches of peers that were not stored, since shared memory is full.",
        "batches_refused_full",
    ),
    "ekko_answers_refused_full": ("Answers to pulls that were given up, since shared memory is full.", "answers_refused_full"),
    "ekko_writers_refused": ("Batches dropped: their model has no room for one more writer.", "writers_refused"),
    "ekko_refuted": ("Times that others told of this node what was not so, and it said what is.", "refuted"),
    "ekko_retirements_refused": ("Entries about retired writers that found no room.", "retirements_refused"),
    "ekko_keys_kept": ("Looks at the allow folder in which keys stayed allowed that could not be read.", "keys_kept"),
    "ekko_transport_revoked": ("Messages dropped unread: their sender's key is not allowed any more.", "transport_revoked"),
    "ekko_transport_handshakes_failed": ("Connections that never spoke ekko's protocol.", "transport_handshakes_failed"),
    "ekko_transport_junk": ("Messages dropped for their frames, before they were read.", "transport_junk"),
    "ekko_transport_connections_lost": ("Connections that ended, in either direction.", "transport_connections_lost"),
    "ekko_publishes_refused_full": ("Steps refused for want of room in their model.", "publishes_refused_full"),
    "ekko_rows_evicted": ("Rows that went to make room in their model.", "rows_evicted"),
    "ekko_rows_refused_full": ("Rows of other nodes that found no room in their model.", "rows_refused_full"),
    "ekko_keys_wanted": ("Keys that readers asked for and that had been dropped, asked of others.", "keys_wanted"),
    "ekko_rows_fetched": ("Rows that had been dropped and came back by key.", "rows_fetched"),
    "ekko_fetches_served": ("Questions of others for rows by key that were answered.", "fetches_served"),
    "ekko_fetches_refused": ("Questions of others for rows by key that were not answered.", "fetches_refused"),
    "ekko_pulls_redirected": ("Questions passed on to nodes that hold all rows.", "pulls_redirected"),
    "ekko_waits_refused": ("Waits of publishers that found too many waiting.", "waits_refused"),
    "ekko_local_requests_malformed": ("Messages on the local endpoint that are not of its protocol.", "local_malformed"),
}


class Delays:
    """The exact delays of the last batches, in the order in which they were applied."""

    def __init__(self, capacity: int = DELAY_SAMPLES_MAX) -> None:
        self._ring = np.zeros(capacity, np.float64)  # milliseconds
        self._count = 0

    def add(self, delay_ms: float) -> None:
        self._ring[self._count % len(self._ring)] = delay_ms
        self._count += 1

    def since(self, position: int) -> dict[str, object]:
        """Delays from `position` on, at most `DELAYS_ANSWER_MAX`; `next` is the position to go on from.

        A position beyond the end is of a former life of the node: everything is given. `lost` counts what was overwritten.
        """
        begin = position if position <= self._count else 0
        oldest = max(0, self._count - len(self._ring))
        first = max(begin, oldest)
        stop = min(self._count, first + DELAYS_ANSWER_MAX)
        values = self._ring[np.arange(first, stop) % len(self._ring)]
        return {"next": stop, "count": self._count, "lost": first - begin, "delays_ms": np.round(values, 3).tolist()}


class Metrics(Collector):
    """Everything /metrics says.

    Args:
        picture: takes the picture that a scrape is answered from.
        machine: hash of this machine, as batches carry it.
    """

    def __init__(self, picture: Callable[[], NodePicture | None], machine: int) -> None:
        self.delays = Delays()
        self.row_delays = RowDelays()
        self._picture = picture
        self._machine = machine
        self._regions: dict[str, Histogram] = {}
        self._registry = CollectorRegistry()
        self._delay = Histogram(
            UPDATE_DELAY,
            "From the entry of publish to the batch's last row being readable here.",
            ["origin_region"],
            buckets=DELAY_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def on_applied(self, batch: BatchApplied, monotonic_ns: int, unix_ms: int) -> None:
        """Record the delay of one batch that was just applied."""
        if batch.machine == self._machine and batch.published_ns > 0:
            delay_ms = (monotonic_ns - batch.published_ns) / 1e6
        else:
            delay_ms = float(max(0, unix_ms - unix_ms_of(batch.stamp)))
        self.delays.add(delay_ms)
        self.row_delays.add(batch.keyspace, delay_ms, batch.rows, batch.significant, monotonic_ns // 1_000_000)
        histogram = self._regions.get(batch.origin_region)
        if histogram is None:
            if len(self._regions) >= REGIONS_MAX:
                return
            histogram = self._regions[batch.origin_region] = self._delay.labels(batch.origin_region)
        histogram.observe(delay_ms / 1000)

    def on_rows(self, rows: RowsApplied, monotonic_ns: int, unix_ms: int) -> None:
        """Record the delays of rows that came from a backlog, by wall clocks."""
        for section in rows.columns:
            if section.stamps is not None and len(section.keys):
                self.row_delays.add_rows(rows.keyspace, section.stamps, section.priority, unix_ms, monotonic_ns // 1_000_000)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        picture = self._picture()
        if picture is None:
            return
        yield _gauge("ekko_ready", "1: the node serves.", int(picture.ready))
        yield _gauge("ekko_synced", "1: the node has caught up with its cluster in this life.", int(picture.protocol.synced))
        yield _gauge(
            "ekko_members_alive", "Live nodes, this one included.", 1 + sum(peer.alive for peer in picture.protocol.peers)
        )
        yield _gauge(
            "ekko_leftover_bytes", "Shared memory that dead nodes of this machine left behind.", picture.leftover_bytes
        )
        for name, (text, counter) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=picture.counters.get(counter, 0))
        yield from _models(picture)
        yield from _priorities(picture, self.row_delays)
        yield from _peers(picture)
        yield from _queues(picture)
        yield from _snapshots(picture)
        yield from _health(picture)
        yield from _delayed(picture)
        yield from _device(picture)
        if picture.server is not None:
            yield from server_metrics(picture.server)
        yield from sink_metrics(picture.sinks)
        rejected = CounterMetricFamily("ekko_rejected_frames", "Messages of peers that were dropped.", labels=["sender"])
        for sender, count in picture.rejected.items():
            rejected.add_metric([sender], count)
        yield rejected


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _models(picture: NodePicture) -> Iterator[Metric]:
    staleness = GaugeMetricFamily("ekko_staleness_ms", "How far this node may be behind the live writers.", labels=["model"])
    open_steps = GaugeMetricFamily("ekko_open_steps", "Steps of which something is still missing.", labels=["model"])
    held = GaugeMetricFamily("ekko_partitions_held", "Partitions of the model that this node holds.", labels=["model"])
    rows = GaugeMetricFamily("ekko_table_rows", "Live rows.", labels=["model", "table"])
    tombstones = GaugeMetricFamily("ekko_table_tombstones", "Deleted rows that are remembered.", labels=["model", "table"])
    size = GaugeMetricFamily("ekko_table_bytes", "Shared memory.", labels=["model", "table"])
    free = GaugeMetricFamily("ekko_table_free_bytes", "Of that, slots that are free for later rows.", labels=["model", "table"])
    total = GaugeMetricFamily("ekko_model_bytes", "Shared memory, the header included.", labels=["model"])
    lacking = GaugeMetricFamily("ekko_incomplete_shards", "Shards of which this node dropped live rows.", labels=["model"])
    limit = GaugeMetricFamily("ekko_model_capacity_bytes", "What it may take (capacity_bytes).", labels=["model"])
    full = GaugeMetricFamily("ekko_memory_full", "1: rows are lacking for which memory had no room.", labels=["model"])
    share = GaugeMetricFamily("ekko_request_share", "Of all keys that readers of this node asked for.", labels=["model"])
    lookups = CounterMetricFamily("ekko_lookups", "Look-ups of readers on this machine.", labels=["model", "table"])
    looked_up = CounterMetricFamily("ekko_keys_looked_up", "Keys that they asked for.", labels=["model", "table"])
    absent = CounterMetricFamily("ekko_keys_absent", "Of those, absent ones, by a sample.", labels=["model", "table"])
    for model in picture.models:
        share.add_metric([model.name], model.request_share)
        full.add_metric([model.name], int(model.full_ms is not None))
        if model.staleness_ms is not None:
            staleness.add_metric([model.name], model.staleness_ms)
        open_steps.add_metric([model.name], model.open_steps)
        held.add_metric([model.name], len(model.hold))
        total.add_metric([model.name], model.bytes)
        lacking.add_metric([model.name], model.incomplete_shards)
        if model.capacity_bytes is not None:
            limit.add_metric([model.name], model.capacity_bytes)
        for table in model.tables:
            rows.add_metric([model.name, table.name], table.rows)
            tombstones.add_metric([model.name, table.name], table.tombstones)
            size.add_metric([model.name, table.name], table.bytes)
            lookups.add_metric([model.name, table.name], table.heat.lookups)
            looked_up.add_metric([model.name, table.name], table.heat.keys)
            absent.add_metric([model.name, table.name], table.heat.misses)
            free.add_metric([model.name, table.name], table.free_bytes)
    yield from (full, share, lookups, looked_up, absent)
    yield from (staleness, open_steps, held, rows, tombstones, size, free, total, limit, lacking)


def _priorities(picture: NodePicture, delays: RowDelays) -> Iterator[Metric]:
    delay = HistogramMetricFamily(
        "ekko_row_delay_seconds", "Of rows, significant and ordinary ones, as of updates.", labels=["model", "kind"]
    )
    weighed = CounterMetricFamily("ekko_rows_weighed", "Rows published here, by what they are.", labels=["model", "kind"])
    failures = CounterMetricFamily("ekko_priority_failures", "Times that a model's formula failed.", labels=["model"])
    replaced = CounterMetricFamily(
        "ekko_priority_fallbacks", "Tables of steps that the built-in formula weighed instead.", labels=["model"]
    )
    threshold = GaugeMetricFamily("ekko_priority_threshold", "From which priority on a row is significant.", labels=["model"])
    for model in picture.models:
        for kind in KINDS:
            counts, total_s = delays.buckets(model.keyspaces, kind, DELAY_BUCKETS_S)
            if counts[-1]:
                bounds = [*map(str, DELAY_BUCKETS_S), "+Inf"]
                delay.add_metric([model.name, kind], list(zip(bounds, counts, strict=True)), total_s)
        if (priority := model.priority) is not None:
            weighed.add_metric([model.name, "significant"], priority.significant)
            weighed.add_metric([model.name, "ordinary"], priority.rows - priority.significant)
            failures.add_metric([model.name], priority.failures)
            replaced.add_metric([model.name], priority.steps_without)
            if priority.threshold is not None:
                threshold.add_metric([model.name], priority.threshold)
    yield from (delay, weighed, failures, replaced, threshold)


def _snapshots(picture: NodePicture) -> Iterator[Metric]:
    if (snapshots := picture.snapshots) is None:
        return
    yield CounterMetricFamily("ekko_snapshots_written", "Snapshots written in this life.", value=snapshots.written)
    yield CounterMetricFamily("ekko_snapshots_failed", "Snapshots that could not be written.", value=snapshots.failed)
    yield _gauge(
        "ekko_snapshots_refused", "Snapshots that were not taken at the start, for their damage.", len(snapshots.refused)
    )
    yield _gauge("ekko_snapshot_bytes", "Rows in the last snapshot.", snapshots.bytes)
    if snapshots.created_ms:
        yield _gauge("ekko_snapshot_created_seconds", "Unix time of the last snapshot.", snapshots.created_ms / 1000)


def _health(picture: NodePicture) -> Iterator[Metric]:
    states = GaugeMetricFamily("ekko_model_state", "1: the model is in this state.", labels=["model", "state"])
    until = GaugeMetricFamily("ekko_healthy_until_seconds", "Unix time up to which it was found healthy.", labels=["model"])
    labels = ["model", "arm", "metric"]
    quality = GaugeMetricFamily("ekko_quality", "Of the last windows, of all nodes, by arm.", labels=labels)
    events = CounterMetricFamily("ekko_quality_events", "Events of scorers of this node.", labels=["model", "fate"])
    text = "Of all nodes' scorers, not judged here since they were not heard of in time."
    missed = GaugeMetricFamily("ekko_quality_missed_events", text, labels=["model"])
    for one in picture.health:
        missed.add_metric([one.model.name], one.missed)
        for state in SEVERITY:
            states.add_metric([one.model.name, state], int(one.state == state))
        if one.healthy_until_ms is not None:
            until.add_metric([one.model.name], one.healthy_until_ms / 1000)
        for arm, figures in one.arms.items():
            for name, value in figures.items():
                if value is not None:
                    quality.add_metric([one.model.name, arm, name], value)
        for fate, count in one.events.items():
            events.add_metric([one.model.name, fate], count)
    yield from (states, until, quality, events, missed)


def _delayed(picture: NodePicture) -> Iterator[Metric]:
    if (delayed := picture.delayed) is None:
        return
    log = delayed["log"]
    yield _gauge("ekko_log_bytes", "What the log of a baseline or witness takes on its disk.", log["bytes"])
    yield _gauge("ekko_log_pending_rows", "Rows in it that the older state does not have yet.", log["pending_rows"])
    yield CounterMetricFamily("ekko_log_rows", "Rows that were written to it.", value=log["rows"])
    yield CounterMetricFamily(
        "ekko_log_files_given_up", "Files of it that were given up for want of room.", value=log["given_up"]
    )
    yield CounterMetricFamily("ekko_log_losses", "Times that a model lost a part of it.", value=delayed["losses"])
    until = GaugeMetricFamily("ekko_delayed_until_seconds", "Unix time of the older state.", labels=["model"])
    exact = GaugeMetricFamily("ekko_delayed_exact_seconds", "Unix time up to which it has everything.", labels=["model"])
    rows = GaugeMetricFamily("ekko_delayed_rows", "Live rows of it.", labels=["model"])
    size = GaugeMetricFamily("ekko_delayed_bytes", "Shared memory of it.", labels=["model"])
    for name, model in delayed["models"].items():
        until.add_metric([name], model["until_ms"] / 1000)
        exact.add_metric([name], model["exact_until_ms"] / 1000)
        rows.add_metric([name], model["rows"])
        size.add_metric([name], model["bytes"])
    yield from (until, exact, rows, size)


# Of each cache, as `gpu.reading.Stats` has them.
_CACHE_COUNTS = {
    "looked_up": "Keys that look-ups asked a cache on the device for.",
    "missed": "Of these, keys that it did not have.",
    "assigned": "Cached rows that were given a newer version.",
    "inserted": "Rows that came into an empty place.",
    "replaced": "Rows that came in the place of others.",
    "refused": "Rows that found all others of their bucket more wanted.",
    "erased": "Rows that were deleted, or dropped for good.",
}


def _device(picture: NodePicture) -> Iterator[Metric]:
    if (device := picture.device) is None:
        return
    yield _gauge("ekko_device_serving", "1: rows are on the device; 0: all are served from the host.", int(device.serving))
    yield _gauge("ekko_device_refusing", "1: some tables have no room there, or it failed.", int(bool(device.reason)))
    yield _gauge("ekko_device_behind_seconds", "How much older than the store its rows are, at most.", device.behind_ms / 1000)
    yield _gauge("ekko_device_waiting_keys", "Keys that changed, and are not there yet.", device.waiting)
    yield CounterMetricFamily("ekko_device_overflows", "Times that more changed than may wait.", value=device.overflows)
    for name, count in device.counts.items():
        yield CounterMetricFamily(f"ekko_device_{name}", COUNT_MEANINGS[name], value=count)
    labels = ["model", "table"]
    rows = GaugeMetricFamily("ekko_device_rows", "Rows in a cache.", labels=labels)
    room = GaugeMetricFamily("ekko_device_rows_max", "Rows that it has room for.", labels=labels)
    counts = {
        name: CounterMetricFamily(f"ekko_device_rows_{name}", text, labels=labels) for name, text in _CACHE_COUNTS.items()
    }
    for model, tables in device.models.items():
        for table, figures in tables.items():
            if figures:  # else it was just made
                rows.add_metric([model, table], figures["size"])
                room.add_metric([model, table], figures["capacity"])
                for name, family in counts.items():
                    family.add_metric([model, table], figures[name])
    yield from (rows, room, *counts.values())


def _peers(picture: NodePicture) -> Iterator[Metric]:
    labels = ["peer", "region", "direction"]
    rows = CounterMetricFamily("ekko_peer_rows", "Rows exchanged with a peer in its present life.", labels=labels)
    size = CounterMetricFamily("ekko_peer_bytes", "Bytes of rows exchanged with a peer in its present life.", labels=labels)
    in_flight = GaugeMetricFamily("ekko_peer_bytes_in_flight", "Sent and not yet acknowledged.", labels=["peer", "region"])
    for peer in picture.protocol.peers:
        for direction, row_count, byte_count in (("in", peer.rows_in, peer.bytes_in), ("out", peer.rows_out, peer.bytes_out)):
            rows.add_metric([peer.node, peer.region, direction], row_count)
            size.add_metric([peer.node, peer.region, direction], byte_count)
        in_flight.add_metric([peer.node, peer.region], peer.bytes_in_flight)
    yield from (rows, size, in_flight, *_credit(picture), *_backlogs(picture))


def _credit(picture: NodePicture) -> Iterator[Metric]:
    """What may be sent to each peer, and why nothing may."""
    labels = ["peer", "region"]
    credit = GaugeMetricFamily("ekko_peer_credit_bytes", "What may be sent and not yet acknowledged.", labels=labels)
    lacks = GaugeMetricFamily("ekko_peer_without_credit", "1 while nothing may be sent to it.", labels=[*labels, "why"])
    path = GaugeMetricFamily("ekko_peer_path_bytes_per_second", "What a path that is narrow was found to take.", labels=labels)
    for peer in picture.protocol.peers:
        names = [peer.node, peer.region]
        credit.add_metric(names, peer.credit_bytes)
        if peer.no_credit:
            lacks.add_metric([*names, peer.no_credit], 1.0)
        if peer.path_bytes_per_s is not None:
            path.add_metric(names, peer.path_bytes_per_s)
    yield from (credit, lacks, path)


def _backlogs(picture: NodePicture) -> Iterator[Metric]:
    """Of links in state mode."""
    labels = ["peer", "region"]
    mode = GaugeMetricFamily("ekko_peer_state_mode", "1 while rows go to it by priority, and not batches.", labels=labels)
    rows = GaugeMetricFamily("ekko_peer_backlog_rows", "Rows that are due to it.", labels=labels)
    size = GaugeMetricFamily("ekko_peer_backlog_bytes", "Bytes of these.", labels=labels)
    saved = CounterMetricFamily("ekko_peer_bytes_saved", "Rows that changed again while they were due.", labels=labels)
    oldest = GaugeMetricFamily("ekko_peer_oldest_seconds", "How long the oldest row has been due.", labels=[*labels, "band"])
    for peer in picture.protocol.peers:
        names = [peer.node, peer.region]
        mode.add_metric(names, float(peer.mode == STATE_MODE))
        rows.add_metric(names, peer.backlog_rows)
        size.add_metric(names, peer.backlog_bytes)
        saved.add_metric(names, peer.bytes_saved)
        for band, ms in peer.oldest_ms.items():
            oldest.add_metric([*names, band], ms / 1000)
    yield from (mode, rows, size, saved, oldest)


def _queues(picture: NodePicture) -> Iterator[Metric]:
    fill = GaugeMetricFamily("ekko_queue_fill", "What a bounded queue holds now.", labels=["queue"])
    bound = GaugeMetricFamily("ekko_queue_bound", "What it may hold.", labels=["queue"])
    for queue in picture.queues:
        fill.add_metric([queue.name], queue.fill)
        bound.add_metric([queue.name], queue.bound)
    yield from (fill, bound)
