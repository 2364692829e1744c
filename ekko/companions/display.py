"""The parameter server beside a node, as `ekko status` shows it."""

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
