"""`ekko status` for people."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ekko.companions.display import server_table, sinks_table

if TYPE_CHECKING:  # `ekko status` needs no store, whose compiled kernels take a while to load
    from ekko.store.leftovers import StoreFiles


def print_status(status: dict[str, Any], console: Console | None = None) -> None:
    """Print a node's answer to GET /status as tables."""
    console = console or Console()
    if "node" not in status:
        console.print(f"The node is starting; it waits for: {', '.join(status.get('waiting_for', []))}")
        return
    node = status["node"]
    state = "[green]ready[/]" if status["ready"] else f"[yellow]waiting for {'; '.join(status['waiting_for'])}[/]"
    console.print(
        f"[bold]{node['id']}[/] {node['role']} in {node['region']}, {node['address']}: {state}, "
        f"up {_duration(node['uptime_s'])}, version {node['version']}"
    )
    if status.get("snapshots"):
        console.print(_snapshots(status["snapshots"]))
    console.print(_members(status))
    console.print(_models(status))
    console.print(_tables(status))
    if any(_seen(model) for model in status["models"].values()):
        console.print(priorities_table(status["models"]))
    for name, model in status["models"].items():
        if (priority := model.get("priority")) and priority["steps_without"]:
            console.print(
                f"[yellow]{name}: priority formula {priority['formula']!r} failed {priority['failures']:,} times[/]: the "
                f"built-in one weighed {priority['steps_without']:,} tables of steps; last: {priority['last_failure']}"
            )
    if status.get("aliases"):
        console.print(aliases_table(status["aliases"]))
    if status.get("rates"):
        console.print(rates_table(status["rates"]))
    if status.get("delayed"):
        console.print(_delayed(status["delayed"]))
        if reason := status["delayed"]["reason"]:
            console.print(f"[yellow]part of the log was lost[/], {status['delayed']['losses']} times, last since: {reason}")
    if status.get("device"):
        console.print(_device(status["device"]))
    if status.get("server"):
        console.print(server_table(status["server"]))
    if status.get("sinks"):
        console.print(sinks_table(status["sinks"]))
    for name, model in status["models"].items():
        fence = model.get("fence")
        if fence is not None and fence["stage"] != "lifted":
            why = f": {fence['note']}" if fence["note"] else ""
            console.print(
                f"[yellow]{name} is fenced[/] (epoch {fence['epoch']}, {fence['stage']}{why}): its writers are stopped until "
                f"it is restored. If nobody restores it any more: ekko lift {name}"
            )
        if model.get("collection_held_up_by"):
            nodes = ", ".join(model["collection_held_up_by"])
            console.print(
                f"[yellow]{name}: deleted rows stay[/], since {_duration(model['held_up_ms'] / 1000)} for: {nodes}. Start them "
                "again, or let go of one that is gone for good: ekko expel NODE"
            )
        if model.get("memory_full_ms") is not None:
            console.print(
                f"[red]{name}: shared memory is full[/], and rows of other nodes have been missing for "
                f"{_duration(model['memory_full_ms'] / 1000)}: enlarge the tmpfs (mount -o remount,size=...) or free space in "
                "it; the node then pulls them by itself"
            )
    if status["peers"]:
        console.print(_peers(status))
    if any(map(_is_narrow, status["peers"])):
        console.print(_narrow(status))
    if any(map(_is_behind, status["peers"])):
        console.print(_backlogs(status))
    console.print(_queues(status))
    if status["rejected"]:
        rejected = ", ".join(f"{sender}: {count}" for sender, count in status["rejected"].items())
        console.print(f"[yellow]rejected messages by sender[/]: {rejected}")
    if leftover := status.get("leftover_bytes"):
        console.print(f"[yellow]dead nodes of this machine left {_size(leftover)} in shared memory[/]: see `ekko clean`")


def print_stores(stores: "Sequence[StoreFiles]", freed: int, *, dry_run: bool, console: Console | None = None) -> None:
    """What `ekko clean` found in shared memory, and did."""
    table = _table("Stores in shared memory", "files", "run_dir", "memory", "state", numbers=(2,))
    for store in stores:
        run_dir = "-" if store.run_dir is None else str(store.run_dir)
        table.add_row(f"{store.prefix}-*", run_dir, _size(store.bytes), store.state.value)
    console = console or Console()
    console.print(table)
    console.print(f"{_size(freed)} {'would be' if dry_run else 'are'} free{'' if dry_run else ' again'}")


def print_hot(answer: dict[str, Any], console: Console | None = None) -> None:
    """Print a node's answer to GET /hot as tables."""
    console = console or Console()
    share = f"{100 * answer['request_share']:.1f} % of all keys that readers of this node ask for"
    console.print(f"[bold]{answer['model']}[/]: {share}")
    for name, part in answer["tables"].items():
        reads = part["reads"]
        console.print(
            f"{name}: {reads['keys']:,} keys in {reads['lookups']:,} look-ups, about {reads['absent']:,} of them absent; "
            f"lately {reads['recent_keys']:,}; counted by the readers of {reads['counted_by']}"
        )
        table = _table(f"Hottest keys of {name}", "key", "requests", "share", "here", numbers=(0, 1, 2))
        for entry in part["hottest"]:
            table.add_row(
                entry["key"],
                f"{entry['requests']:,.0f}",
                f"{100 * entry['share']:.2f} %",
                "yes" if entry["here"] else "[red]no[/]",
            )
        if part["hottest"]:
            console.print(table)


def _members(status: dict[str, Any]) -> Table:
    table = _table("Members", "node", "region", "role", "address", "holds", "state")
    divided = {name: model["partitions"] for name, model in status["models"].items() if model["partitions"] > 1}
    for member in status["members"]:
        table.add_row(
            member["node"],
            member["region"],
            member["role"],
            member["address"],
            "; ".join(f"{name}: {_partitions(member['hold'].get(name, []), count)}" for name, count in divided.items()),
            "[green]alive[/]" if member["alive"] else "[red]silent[/]",
        )
    return table


def _snapshots(snapshots: dict[str, Any]) -> str:
    """One line about snapshots."""
    age = f"{_duration(time.time() - snapshots['created_ms'] / 1000)} ago" if snapshots["created_ms"] else "none yet"
    line = f"Snapshots at {snapshots['url']}: {age}"
    if snapshots["running"]:
        line += f", one is being written: {_size(snapshots['done_bytes'])} of {_size(snapshots['total_bytes'])}"
    if snapshots["error"]:
        line += f", [red]the last one failed: {snapshots['error']}[/]"
    return line


def _models(status: dict[str, Any]) -> Table:
    table = _table("Models", "model", "codec", "partitions", "rows", "memory", "staleness", "state", numbers=(3, 4, 5))
    for name, model in status["models"].items():
        pulling = f", pulling from {model['pulling_from']}" if model["pulling_from"] else ""
        state = ("synced" if model["synced"] else "[yellow]catching up[/]") + pulling
        if lacking := model.get("incomplete_shards"):
            state += f", [yellow]rows dropped in {lacking} of {model['shards']} shards[/]"
        staleness = "-" if model["staleness_ms"] is None else f"{model['staleness_ms']:,} ms"
        held = _partitions(model["hold"], model["partitions"])
        limit = "" if model.get("capacity_bytes") is None else f" of {_size(model['capacity_bytes'])}"
        memory = _size(model["bytes"]) + limit
        table.add_row(name, model["codec"], held, f"{model['rows']:,}", memory, staleness, state)
    return table


def _tables(status: dict[str, Any]) -> Table:
    table = _table("Tables", "model", "table", "dim", "rows", "deleted", "memory", "of it free", numbers=(2, 3, 4, 5, 6))
    for model in status["models"]:
        for name, part in status["models"][model]["tables"].items():
            sizes = _size(part["bytes"]), _size(part.get("free_bytes", 0))
            table.add_row(model, name, str(part["dim"]), f"{part['rows']:,}", f"{part['tombstones']:,}", *sizes)
    return table


def _seen(model: dict[str, Any]) -> bool:
    return any(part["rows"] for part in model.get("row_delays", {}).values())


def priorities_table(models: dict[str, Any]) -> Table:
    """How much of what came was significant, and how late it was lately, beside the rest."""
    names = ("rows", "significant", "p50", "p99", "rest p50", "p99")
    table = _table("Updates", "model", *names, numbers=tuple(range(1, 7)))
    for name, model in models.items():
        if not _seen(model):
            continue
        significant, ordinary = model["row_delays"]["significant"], model["row_delays"]["ordinary"]
        rows = significant["rows"] + ordinary["rows"]
        delays = [_delay(part[key]) for part in (significant, ordinary) for key in ("p50_ms", "p99_ms")]
        table.add_row(name, f"{rows:,}", f"{100 * significant['rows'] / rows:.2f} %", *delays)
    return table


def _delay(value_ms: float | None) -> str:
    if value_ms is None:
        return "-"
    return f"{value_ms:.1f} ms" if value_ms < 1000 else f"{value_ms / 1000:,.1f} s"


def aliases_table(aliases: dict[str, Any]) -> Table:
    """What each alias stands for."""
    table = _table("Aliases", "alias", "model", "way back", "state")
    for name, alias in aliases.items():
        state = f"[yellow]about to be {alias['next']}[/]" if alias["next"] else "" if alias["here"] else "[red]not here[/]"
        table.add_row(name, alias["model"], alias["back"] or "", state)
    return table


def rates_table(rates: dict[str, Any]) -> Table:
    """What updates may use between regions."""
    table = _table("Rates", "regions", "Mbit/s", "our share", "charged", "waits", "says", numbers=(1, 2, 3, 4))
    for pair, rate in rates.items():
        table.add_row(
            pair,
            "no limit" if rate["rate_mbps"] is None else f"{rate['rate_mbps']:g}",
            "-" if rate["share_mbps"] is None else f"{rate['share_mbps']:.3g}",
            "-" if rate["bytes_charged"] is None else _size(rate["bytes_charged"]),
            "-" if rate["waits"] is None else f"{rate['waits']:,}",
            "an operator" if rate["said"] else "the file",
        )
    return table


def _partitions(hold: list[int], partitions: int) -> str:
    """What is held of a model: "all of 4", "0, 2 of 4"; nothing of one that is not divided."""
    if partitions == 1:
        return ""
    return f"{'all' if len(hold) == partitions else ', '.join(map(str, hold)) or 'none'} of {partitions}"


def _peers(status: dict[str, Any]) -> Table:
    table = _table(
        "Peers",
        *("node", "rows in", "rows out", "bytes in", "bytes out", "in flight", "skipped"),
        numbers=(1, 2, 3, 4, 5, 6),
    )
    for peer in status["peers"]:
        table.add_row(
            peer["node"],
            f"{peer['rows_in']:,}",
            f"{peer['rows_out']:,}",
            _size(peer["bytes_in"]),
            _size(peer["bytes_out"]),
            _size(peer["bytes_in_flight"]),
            f"{peer['batches_skipped']:,}",
        )
    return table


def _is_narrow(peer: dict[str, Any]) -> bool:
    """Whether less passes to it than is wanted: nodes of a release before do not say."""
    return bool(peer.get("no_credit")) or peer.get("path_bytes_per_s") is not None


def _narrow(status: dict[str, Any]) -> Table:
    """Links on which something waits, or whose path was found to be narrow though no rate is set."""
    table = _table("Narrow links", "node", "in flight", "at most", "path", "round trip", "waits for", numbers=(1, 2, 3, 4))
    for peer in filter(_is_narrow, status["peers"]):
        path, round_trip_ms = peer["path_bytes_per_s"], peer["round_trip_ms"]
        table.add_row(
            peer["node"],
            _size(peer["bytes_in_flight"]),
            _size(peer["credit_bytes"]),
            "" if path is None else f"{path * 8 / 1e6:,.1f} Mbit/s",
            "" if round_trip_ms is None else f"{round_trip_ms:,} ms",
            f"[yellow]{peer['no_credit']}[/]" if peer["no_credit"] else "",
        )
    return table


def _is_behind(peer: dict[str, Any]) -> bool:
    """Whether rows are due to it, or were: nodes of a release before know no backlogs."""
    return peer.get("mode", "pass-through") != "pass-through" or bool(peer.get("bytes_saved"))


def _backlogs(status: dict[str, Any]) -> Table:
    """What is due where the network is busy."""
    table = _table("Backlogs", "node", "mode", "due", "oldest", "saved", numbers=(4,))
    for peer in filter(_is_behind, status["peers"]):
        table.add_row(
            peer["node"],
            "" if peer["mode"] == "pass-through" else f"[yellow]{peer['mode']}[/]",
            f"{peer['backlog_rows']:,} rows, {_size(peer['backlog_bytes'])}" if peer["backlog_rows"] else "",
            ", ".join(f"{band} {ms / 1000:,.1f} s" for band, ms in peer["oldest_ms"].items()),
            _size(peer["bytes_saved"]) if peer["bytes_saved"] else "",
        )
    return table


def _delayed(delayed: dict[str, Any]) -> Table:
    """The older state of a baseline or witness."""
    log = delayed["log"]
    title = (
        f"Older state, {'at least ' if delayed['role'] == 'witness' else ''}{_duration(delayed['delay_s'])} behind; log "
        f"{_size(log['bytes'])} of {_size(log['bound'])}, {log['pending_rows']:,} rows wait"
    )
    table = _table(title, "model", "is at", "exact up to", "can be told up to", "rows", "memory", "unknown", numbers=(4, 5, 6))
    for name, model in delayed["models"].items():
        table.add_row(
            name,
            *(_moment(model[key]) for key in ("until_ms", "exact_until_ms", "known_until_ms")),
            f"{model['rows']:,}",
            _size(model["bytes"]),
            "to be compared" if model["comparing"] else f"{model['blurs']} stretches" if model["blurs"] else "-",
        )
    return table


def _device(device: dict[str, Any]) -> Table:
    """Rows on a device."""
    state = "" if device["serving"] else "; [yellow]all rows are served from the host[/]"
    why = f": [yellow]{escape(device['reason'])}[/]" if device["reason"] else ""
    title = f"Rows on {device['name']}, at most {device['behind_ms'] / 1000:,.1f} s behind{state}{why}"
    table = _table(title, "model", "table", "rows", "room for", "looked up", "found", "updated", numbers=(2, 3, 4, 5, 6))
    for model, tables in device["models"].items():
        for name, cache in tables.items():
            if cache:  # else it was just made
                asked = cache["looked_up"]
                found = f"{1 - cache['missed'] / asked:.1%}" if asked else "-"
                counts = [f"{count:,}" for count in (cache["size"], cache["capacity"], asked)]
                table.add_row(model, name, *counts, found, f"{cache['assigned']:,}")
    return table


def _moment(unix_ms: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_ms / 1000)) if unix_ms else "-"


def _queues(status: dict[str, Any]) -> Table:
    table = _table("Queues", "queue", "fill", "bound", numbers=(1, 2))
    for queue in status["queues"]:
        table.add_row(queue["name"], f"{queue['fill']:,}", f"{queue['bound']:,}")
    return table


def _table(title: str, *columns: str, numbers: tuple[int, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left")
    return table


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"
