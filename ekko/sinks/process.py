"""A sink's process, as a node starts it for each `[sinks.NAME]` of its configuration; the node's side is `ekko.node.sinks`.

To it comes what it is to feed, and nothing else: how far the sink is, the sink itself says. From it, twice a second: the feed's
counts, rows in a second, how late it is, and its place in the node's ring of changes, from which the node tells what waits.
"""

import time
from dataclasses import asdict
from typing import Final

import structlog

from ekko.companions.channel import Channel
from ekko.logs import configure_logs
from ekko.serve.feeding import Feed
from ekko.serve.session import FeedCounts
from ekko.sinks.running import run, sink_of

STATE_S: Final = 0.5

log = structlog.get_logger(__name__)


def serve(channel: Channel) -> None:
    """All of the process; for `ekko.companions.channel.run`."""
    begin = channel.read_begin()
    configure_logs(node=begin["node"], part="sink", sink=begin["sink"])
    channel.listen(lambda _: None)
    feed = Feed(
        begin["run_dir"],
        begin["model"],
        sink_of(begin["target"], begin["feed_name"], begin["prefix"]),
        tables=begin["tables"],
    )

    def tell(counts: FeedCounts, rows_per_s: int) -> None:
        now_ms = time.time_ns() // 1_000_000
        late_ms = max(0, now_ms - counts.through_ms) if counts.through_ms else None
        place = feed.place
        where = None if place is None else [place.model, place.breaks, place.position]
        channel.say(state={**asdict(counts), "rows_per_s": rows_per_s, "late_ms": late_ms, "place": where})

    run(feed, STATE_S, tell)
