"""`ekko rollback`: take a model back, see what that would do, and what was taken back before."""

import json
import sys
import time
from typing import Annotated, Any
from urllib.parse import quote

import typer

from ekko.asking import ask_node
from ekko.errors import ConfigError, EkkoError
from ekko.options import ConfigOption, HttpOption, JsonOption, http_of
from ekko.rollback.moments import HEALTHY, parse_moment, show_moment

POLL_S = 0.2
STEPS = {
    "requested": "waits for a witness",
    "fencing": "stops the writers",
    "converging": "gets all that they wrote",
    "planning": "works out what differs",
    "writing": "writes it back",
    "waiting": "waits until every replica has it",
    "probing": "lets a little traffic through, until it is judged healthy",
    "lifting": "lets writers go on",
}


def rollback(
    model: Annotated[
        str | None, typer.Argument(help="The model; none: what was taken back, of all.", metavar="[MODEL]", show_default=False)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help='"healthy", a time ago ("5m ago"), or a date and time; none: the history.', metavar="TIME"),
    ] = None,
    table: Annotated[list[str] | None, typer.Option("--table", "-t", help="Only this table; may be given again.")] = None,
    writer: Annotated[str | None, typer.Option("--writer", help="Only rows that this node wrote last.", metavar="NODE")] = None,
    keys: Annotated[str | None, typer.Option("--keys", help="Only keys from A on, up to B.", metavar="A:B")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take: rows, bytes, seconds.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; nor does --json.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also in place of one that goes on.")] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="Let writers go on, though the model is not judged healthy yet.")
    ] = False,
    at_risk: Annotated[
        str | None,
        typer.Option("--at-risk", help="Name the good rows that went with the bad ones; at its witness.", metavar="EPOCH"),
    ] = None,
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a model back to how it was: its writers are stopped, what differs is written back, then they go on.

    Ask any node, on its own machine; a witness carries it out. Writers of the whole model are stopped, also where only a part
    of it is taken back. What happens is shown until it is over; Ctrl-C ends only the showing.
    """
    narrowed = bool(table or writer or keys or dry_run or force)
    if (finish or at_risk is not None) and (to is not None or narrowed):
        raise ConfigError("with --finish or --at-risk nothing is taken back: leave --to and what belongs to it out")
    address = http_of(config, http)
    if finish:
        shown = ask_node(address, "/rollback", {"model": _named(model), "finish": True})
        typer.echo(json.dumps(shown) if as_json else f"rollback of {model}: {shown['step']}")
        return
    if at_risk is not None:
        _show_at_risk(address, at_risk, as_json)
        return
    if to is None:
        if narrowed:
            raise ConfigError('give --to TIME, such as --to healthy or --to "5m ago"')
        _show_history(address, model, as_json)
        return
    from ekko.rollback.scope import parse_keys

    to_ms = parse_moment(to, time.time_ns() // 1_000_000)
    request: dict[str, object] = {
        "model": _named(model),
        "to_ms": to_ms,
        "tables": list(table or []),
        "writer": writer or "",
        "keys": None if keys is None else [str(bound) for bound in parse_keys(keys)],
        "force": force,
    }
    if dry_run or not (yes or as_json):
        plan = _follow(address, ask_node(address, "/rollback", {**request, "dry_run": True}), quiet=True)
        _check(plan)
        if dry_run:
            typer.echo(json.dumps(plan) if as_json else _forecast(plan))
            return
        typer.echo(_forecast(plan))
        typer.confirm("Stop the writers of this model, and take it back?", abort=True)
    done = _follow(address, ask_node(address, "/rollback", {**request, "dry_run": False}), quiet=as_json)
    _check(done)
    typer.echo(json.dumps(done) if as_json else _result(done))


def _named(model: str | None) -> str:
    if model is None:
        raise ConfigError("name the model that is to be taken back")
    return model


def _follow(address: str, request: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Show what becomes of a request until it is over; returns the end."""
    shown = ""
    while True:
        answer = ask_node(address, f"/rollback?epoch={request['epoch']}")
        now = answer["rollbacks"][0] if answer["rollbacks"] else request
        line = STEPS.get(now["step"], now["step"])
        if now["step"] == "writing":
            line += f": {now['rows_done']:,} of {now['rows']:,} rows"
        if now["unreachable"]:
            line += f"; not reached: {', '.join(now['unreachable'])}"
        if line != shown and not quiet and not now["over"]:
            sys.stderr.write(f"{now['witness'] or 'nobody yet'}: {line}\n")
            shown = line
        if now["over"]:
            return dict(now)
        time.sleep(POLL_S)


def _check(done: dict[str, Any]) -> None:
    if done["step"] == "failed":
        raise EkkoError(f"model {done['model']!r} was not taken back: {done['reason']}")


def _figures(plan: dict[str, Any]) -> str:
    others = f", {plan['others']:,} as another writer left them since" if plan["others"] else ""
    return f"{plan['rows']:,} rows ({plan['deletions']:,} of them deletions{others}), {plan['payload_bytes']:,} bytes"


def _forecast(plan: dict[str, Any]) -> str:
    risk = f"; {plan['at_risk']:,} good rows would be lost, or may be" if plan["at_risk"] else ""
    seconds = plan["estimate_ms"] / 1_000
    return (
        f"{plan['model']} would go back to {show_moment(plan['cut_ms'])}: {_figures(plan)}, about {seconds:.1f} s "
        f"(witness {plan['witness']}){risk}"
    )


def _result(done: dict[str, Any]) -> str:
    lost = (
        f"; {done['at_risk']:,} good rows were lost, or may be: `ekko rollback --at-risk {done['epoch']}` at {done['witness']}"
    )
    risk = lost if done["at_risk"] else ""
    away = f"; not reached: {', '.join(done['unreachable'])}" if done["unreachable"] else ""
    return f"{done['model']} is as it was at {show_moment(done['cut_ms'])}: {_figures(done)}{risk}{away}"


def _show_at_risk(address: str, epoch: str, as_json: bool) -> None:
    answer = ask_node(address, f"/rollback?epoch={quote(epoch)}&at_risk=1")
    if as_json:
        typer.echo(json.dumps(answer))
        return
    for row in answer["rows"]:
        typer.echo(f"{row['table']}  {row['key']}  {row['written'] or 'not known when'}")
    if (more := answer["at_risk"] - len(answer["rows"])) > 0:
        typer.echo(f"and {more:,} more that are not named")


def _show_history(address: str, model: str | None, as_json: bool) -> None:
    answer = ask_node(address, "/rollback" if model is None else f"/rollback?model={model}")
    if as_json:
        typer.echo(json.dumps(answer))
        return
    told = [one for one in answer["rollbacks"] if not one["dry"]]
    for one in told:
        when, what = show_moment(one["requested_ms"]), "by verdict" if one["automatic"] else f"asked at {one['asked_by']}"
        to_ms = one["cut_ms"] or one["to_ms"]
        to = "to its last healthy state" if to_ms == HEALTHY else f"to {show_moment(to_ms)}"
        rest = f": {one['reason']}" if one["reason"] else f", {_figures(one)}"
        rest += f", {one['at_risk']:,} at risk (--at-risk {one['epoch']})" if one["at_risk"] else ""
        typer.echo(f"{when}  {one['model']}  {one['step']}  {to}  {what}  witness {one['witness'] or 'nobody'}{rest}")
    if not told:
        typer.echo("nothing was taken back" + ("" if model is None else f" of model {model}"))
