"""What `/metrics` says of a node's companions."""

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ekko.companions.picture import ServerPicture, SinkPicture

_SERVER_COUNTS: Final = {
    "pulls": "Pulls of workers that were taken.",
    "pushes": "Pushes of workers that were taken, repeated ones included.",
    "refused": "Requests that could never be taken, such as gradients that are not finite.",
    "busy": "Requests that found no room or nobody in charge yet, and are sent again.",
    "rows_pulled": "Rows that pulls were answered with.",
    "rows_applied": "Rows that steps changed.",
    "rows_made": "Of these, rows that there were none of before.",
    "rows_not_admitted": "Gradients left out, since their keys were not pushed often enough.",
    "rows_not_finite": "Rows that a step would have made infinite or no number, and that stayed as they were.",
    "rows_served": "Rows published to the served model.",
    "rows_reconciled": "Of these, rows that were found lacking there at a start or a take-over.",
    "rows_out_of_range": "Rows that the served model's codec has no number for, left out there.",
}


def server_metrics(server: ServerPicture) -> Iterator[Metric]:
    """Of the parameter server."""
    yield GaugeMetricFamily("ekko_server_up", "1: the server beside this node runs.", value=int(server.process.running))
    yield CounterMetricFamily(
        "ekko_server_starts", "Times that it was started in this life of the node.", value=server.process.starts
    )
    yield CounterMetricFamily("ekko_server_failures", "Times that it ended by itself.", value=server.process.failures)
    yield CounterMetricFamily(
        "ekko_server_malformed", "Messages that are not of its protocol.", value=server.process.state.get("malformed", 0)
    )
    acting = GaugeMetricFamily("ekko_server_partitions", "Partitions that it acts for.", labels=["model"])
    waiting = GaugeMetricFamily("ekko_server_waiting", "Requests that wait.", labels=["model", "request"])
    ack = GaugeMetricFamily(
        "ekko_server_ack_seconds", "From a push to its answer, of the last ones.", labels=["model", "quantile"]
    )
    blocked = GaugeMetricFamily("ekko_server_waits_for", "1: something waits for this node.", labels=["model", "what", "node"])
    oldest = GaugeMetricFamily("ekko_server_oldest_push_seconds", "Since when a push waits for its answer.", labels=["model"])
    clocks = GaugeMetricFamily("ekko_server_worker_clock", "Last push of a worker that counts.", labels=["model", "worker"])
    late = GaugeMetricFamily(
        "ekko_server_worker_late_seconds", "Since when others wait for this worker.", labels=["model", "worker"]
    )
    counts = {name: CounterMetricFamily(f"ekko_server_{name}", text, labels=["model"]) for name, text in _SERVER_COUNTS.items()}
    for name, model in server.models.items():
        oldest.add_metric([name], model["oldest_push_s"])
        for gauge, figures in ((clocks, model["clocks"]), (late, model["late_s"])):
            for worker, figure in figures.items():
                gauge.add_metric([name, str(worker)], figure)
        acting.add_metric([name], len(model["acting"]))
        for request in ("pulls", "pushes"):
            waiting.add_metric([name, request], model[f"{request}_waiting"])
        for quantile, milliseconds in zip(("0.5", "0.99"), model["ack_ms"], strict=True):
            ack.add_metric([name, quantile], milliseconds / 1000)
        for what, nodes in model["waiting_for"].items():
            for node in nodes:
                blocked.add_metric([name, what, node], 1.0)
        for count, family in counts.items():
            family.add_metric([name], model["counts"][count])
    yield from (acting, waiting, ack, blocked, oldest, clocks, late, *counts.values())


_SINK_COUNTS: Final = {
    "rows": "Rows that were given to a sink in this life of its process.",
    "deleted": "Deletions likewise.",
    "forgotten": "Keys likewise that the node does not have any more for another reason.",
    "tensors": "Dense tensors likewise.",
    "batches": "Batches likewise.",
    "coalesced": "Changes of rows that were to be sent anyway.",
    "overflows": "Times that the node's changes were overwritten before they were read.",
    "walks": "Looks at all rows.",
    "retries": "Times that a sink had to be opened again, or its node's memory.",
}


def sink_metrics(sinks: Iterable[SinkPicture]) -> Iterator[Metric]:
    """Of sinks."""
    labels = ["sink", "model"]
    up = GaugeMetricFamily("ekko_sink_up", "1: the sink's process runs, and what it did last succeeded.", labels=labels)
    behind = GaugeMetricFamily("ekko_sink_behind_rows", "Changes that are not in the sink yet.", labels=labels)
    late = GaugeMetricFamily("ekko_sink_behind_seconds", "Since the sink had all that the node has.", labels=labels)
    rate = GaugeMetricFamily("ekko_sink_rows_per_second", "Rows that were given to it lately.", labels=labels)
    whole = GaugeMetricFamily("ekko_sink_comparing", "1: all rows are being sent or compared.", labels=labels)
    starts = CounterMetricFamily("ekko_sink_starts", "Times that its process was started.", labels=labels)
    failures = CounterMetricFamily("ekko_sink_failures", "Times that it ended by itself.", labels=labels)
    counts = {name: CounterMetricFamily(f"ekko_sink_{name}", text, labels=labels) for name, text in _SINK_COUNTS.items()}
    for sink in sinks:
        names, state = [sink.name, sink.model], sink.process.state
        up.add_metric(names, int(sink.working))
        starts.add_metric(names, sink.process.starts)
        failures.add_metric(names, sink.process.failures)
        if sink.behind_rows is not None:
            behind.add_metric(names, sink.behind_rows)
        if sink.behind_ms is not None:
            late.add_metric(names, sink.behind_ms / 1000)
        if state:
            rate.add_metric(names, state["rows_per_s"])
            whole.add_metric(names, int(state["walking"] or state["sweeping"]))
            for name, family in counts.items():
                family.add_metric(names, state[name])
    yield from (up, behind, late, rate, whole, starts, failures, *counts.values())
