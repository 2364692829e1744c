"""`ekko health`: what models are, since when and why; and an operator's word on one."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from ekko.asking import ask_node, fetch_status
from ekko.errors import ConfigError, ModelError
from ekko.options import ConfigOption, HttpOption, JsonOption, http_of

COLOURS = {"healthy": "green", "uncertain": "yellow", "corrupted": "red"}
FIGURES = ("events", "auc", "log_loss", "ctr", "calibration", "own")


def health(
    model: Annotated[str | None, typer.Argument(help="The model; none: all.", metavar="[MODEL]", show_default=False)] = None,
    state: Annotated[
        str | None, typer.Option("--set", help="Overrule what was found: healthy, uncertain or corrupted.", metavar="STATE")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="With --set: from when on, e.g. 2026-11-23T04:10:00Z.", metavar="TIME")
    ] = None,
    why: Annotated[str, typer.Option("--why", help="With --set: for the log that all nodes have.")] = "",
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which models are healthy, uncertain or corrupted: since when, why, and the figures of both arms.

    With --set, say what a model was in truth: from --since, or over the last stretch in doubt, up to now, on all nodes.
    """
    address = http_of(config, http)
    if state is not None:
        from ekko.health.verdicts import SEVERITY

        if model is None or state not in SEVERITY:
            raise ConfigError(f"--set {state}: expected a model before it, and one of {', '.join(SEVERITY)}")
        answer = ask_node(address, "/health", {"model": model, "state": state, "from_ms": _moment(since), "why": why})
        said = f"{answer['model']} counts as {state} from {_time(answer['from_ms'])} to {_time(answer['until_ms'])} UTC"
        typer.echo(json.dumps(answer) if as_json else said)
        return
    picture = fetch_status(address)
    known: dict[str, Any] = picture.get("health", {})
    rollbacks: dict[str, Any] = picture.get("rollbacks", {})
    if model is not None:
        model = picture.get("aliases", {}).get(model, {"model": model})["model"]
        if model not in known:
            raise ModelError(f"the node has no model {model!r}: it has {', '.join(map(repr, known)) or 'none'}")
        known = {model: known[model]}
    known = {name: {**one, "rollback": rollbacks.get(name)} for name, one in known.items()}
    if as_json:
        typer.echo(json.dumps(known, indent=2))
        return
    for name, one in known.items():
        _show(name, one, detailed=model is not None)


def _show(name: str, one: Mapping[str, Any], *, detailed: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    colour = COLOURS[one["state"]]
    judged, until = one["judged_until_ms"], one["healthy_until_ms"]
    when = "never judged" if judged is None else f"judged up to {_time(judged)}"
    healthy = "" if until is None else f", healthy up to {_time(until)}"
    console.print(f"[bold]{name}[/]: [{colour}]{one['state']}[/], {when}{healthy} UTC", soft_wrap=True)
    table = Table("arm", *FIGURES, title=f"{one['baseline_share']:.2%} of requests are the baseline's")
    for arm, figures in one["arms"].items():
        table.add_row(arm, *(_number(figures[figure]) for figure in FIGURES))
    for segment, arms in one["segments"].items() if detailed else ():
        for arm, figures in arms.items():
            table.add_row(f"{arm}, {segment}", *(_number(figures[figure]) for figure in FIGURES))
    console.print(table)
    if one["serving_share"] < 1:
        console.print(f"  the online model answers {one['serving_share']:.1%} of the others")
    if one.get("missed"):
        console.print(f"  {one['missed']:,} events of other nodes' scorers were not heard of in time, and are not judged here")
    if (taken := one["rollback"]) is not None:
        console.print(f"  {_rollback(taken)}", soft_wrap=True, markup=False)
    if not detailed:
        return
    for detector, text in one["why"].items():
        console.print(f"  {detector}: {text}", soft_wrap=True, markup=False)
    for entry in one["log"]:
        span = f"{_time(entry['from_ms'])} to {_time(entry['until_ms'])}"
        line = f"  {_time(entry['at_ms'])} {entry['state']} ({span}) by {entry['detector']} at {entry['node']}: {entry['why']}"
        console.print(line, soft_wrap=True, markup=False)


def _rollback(taken: Mapping[str, Any]) -> str:
    """The last one, which may go on."""
    when, who = _time(taken["requested_ms"]), taken["witness"] or "nobody yet"
    if taken["step"] == "failed":
        return f"asked at {when} UTC to be taken back, which failed: {taken['reason']}"
    if not taken["over"]:
        rows = f"{taken['rows_done']:,} of {taken['rows']:,} rows"
        return f"being taken back since {when} UTC by {who}, step {taken['step']}: {rows}"
    return f"taken back at {when} UTC to how it was at {_time(taken['cut_ms'])} UTC by {who}: {taken['rows']:,} rows"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1_000 else f"{value:.4g}"


def _time(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%H:%M:%S")


def _moment(text: str | None) -> int | None:
    """Unix milliseconds of a time as ISO 8601 has it; UTC where it names no zone."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--since {text}: expected a time such as 2026-11-23T04:10:00Z") from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
