"""A node's companions, as `ekko status` shows them."""

import time
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

CLOCKS_SHOWN: Final = 16


def server_table(server: dict[str, Any]) -> Table:
    """The parameter server beside the node."""
    state = "" if server["running"] else "; [red]it does not run[/]"
    why = f": [yellow]{escape(server['error'])}[/]" if server["error"] and not server["running"] else ""
    ended = f", ended {server['failures']} times" if server["failures"] else ""
    title = f"Parameter server at {server['endpoint']}{ended}{state}{why}"
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in (
        "model",
        "mode",
        "acts for",
        "workers' clocks",
        "pushes, pulls waiting",
        "answer ms (p50, p99)",
        "waits for",
    ):
        table.add_column(column)
    for name, model in server["models"].items():
        waits = [f"{what}: {', '.join(nodes)}" for what, nodes in model["waiting_for"].items()]
        waits += [model["trouble"]] if model["trouble"] else []
        waits += [f"worker {worker}, for {waited_s:,.0f} s" for worker, waited_s in model["late_s"].items()][:CLOCKS_SHOWN]
        waits += [f"not for worker {', '.join(map(str, model['dropped'][:CLOCKS_SHOWN]))}: dropped"] if model["dropped"] else []
        behind = sorted(model["clocks"].items(), key=lambda one: one[1])[:CLOCKS_SHOWN]  # who is last is who matters
        clocks = ", ".join(f"{worker}: {clock:,}" for worker, clock in sorted(behind, key=lambda one: int(one[0])))
        acting = ", ".join(map(str, model["acting"])) or "nothing"
        waiting = f"{model['pushes_waiting']}, {model['pulls_waiting']}"
        answers = ", ".join(f"{milliseconds:,.1f}" for milliseconds in model["ack_ms"])
        table.add_row(name, model["mode"], acting, clocks, waiting, answers, f"[yellow]{escape('; '.join(waits))}[/]")
    return table


def sinks_table(sinks: dict[str, Any]) -> Table:
    """The foreign stores that are kept as the node is."""
    table = Table(title="Sinks", title_justify="left", header_style="bold")
    for column in ("sink", "model", "into"):
        table.add_column(column)
    for column in ("rows", "rows/s", "behind, rows", "behind, s"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for name, sink in sinks.items():
        counts = sink["counts"]
        table.add_row(
            name,
            sink["model"],
            escape(sink["target"]),
            f"{counts.get('rows', 0):,}",
            f"{counts.get('rows_per_s', 0):,}",
            "-" if sink["behind_rows"] is None else f"{sink['behind_rows']:,}",
            "-" if sink["behind_ms"] is None else f"{sink['behind_ms'] / 1000:,.1f}",
            _sink_state(sink),
        )
    return table


def _sink_state(sink: dict[str, Any]) -> str:
    counts, error = sink["counts"], escape(sink["last_error"])
    ended = f", ended {sink['failures']} times" if sink["failures"] else ""
    if not sink["running"]:
        return f"[red]it does not run[/]{ended}: [yellow]{error}[/]"
    if counts.get("error"):
        return f"[red]it fails[/]{ended}: [yellow]{escape(counts['error'])}[/]"
    doing = "begins"
    if counts:
        doing = "all rows are sent" if counts["walking"] else "what is gone is looked for" if counts["sweeping"] else "follows"
    ago = max(0, round(time.time() - sink["last_error_ms"] / 1000))
    return doing + ended + (f"; {ago:,} s ago: [yellow]{error}[/]" if error else "")
