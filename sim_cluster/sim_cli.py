"""`ekko sim run`: the command. It imports nothing heavy before it is called, since every `ekko` command loads this module."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ekko.errors import ConfigError

if TYPE_CHECKING:
    from sim_cluster.scenario import Scenario
    from sim_cluster.swarm import Outcome

EXIT_VIOLATION = 1


def register(app: typer.Typer) -> None:
    """Add `ekko sim` to the `ekko` command."""
    sim = typer.Typer(no_args_is_help=True, help="Many nodes on this machine, with faults.", rich_markup_mode=None)
    sim.callback()(_group)
    sim.command()(run)
    app.add_typer(sim, name="sim")


def _group() -> None:
    """Many nodes on this machine, with faults."""


def run(
    scenario: Annotated[Path, typer.Argument(help="What the cluster is and what happens to it.", metavar="SCENARIO.toml")],
    virtual: Annotated[bool, typer.Option("--virtual", help="In virtual time, instead of as real processes.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Everything random derives from it.")] = 0,
    seeds: Annotated[str, typer.Option("--seeds", help="Run seeds A to B-1 (with --virtual).", metavar="A:B")] = "",
    sync: Annotated[
        str,
        typer.Option(
            "--sync",
            help="By which protocol: vector, cache, shard_versions, leaders, push (the product); instead of the scenario's.",
            metavar="PRESET",
        ),
    ] = "",
    json_out: Annotated[str, typer.Option("--json", help="Write the outcome here, or to stdout with -.", metavar="OUT")] = "",
) -> None:
    """Run a scenario: nodes, links, load and faults, and the protocol's invariants checked.

    In virtual time every check runs all the while, and a seed that fails prints the command that replays it and the fewest
    faults that still make it fail. As real processes, every node must hold at the end what the trainer holds.

    Exit codes: 0 all checks passed, 1 one failed, 2 a mistake in the scenario.
    """
    from sim_cluster.scenario import load_scenario, sync_named

    plan = load_scenario(scenario)
    plan = replace(plan, sync=sync_named(sync)) if sync else plan
    chosen = _seeds(seeds, seed)
    if virtual:
        outcomes = [_run_virtual(plan, scenario, one, f" --sync {sync}" if sync else "") for one in chosen]
        result: dict[str, Any] = {"scenario": plan.name, "virtual": True, "runs": [_as_json(outcome) for outcome in outcomes]}
        failed = [outcome.seed for outcome in outcomes if outcome.problem]
        typer.echo(f"{len(outcomes)} runs, {len(failed)} failed{': seeds ' + ', '.join(map(str, failed)) if failed else ''}")
    else:
        if seeds:
            raise ConfigError("--seeds runs many clusters in virtual time: add --virtual, or give one --seed")
        from sim_cluster.real import run_real

        result = {"scenario": plan.name, "virtual": False, **run_real(plan, seed)}
        failed = [seed] if result["problem"] else []
        typer.echo(result["problem"] or "every node holds what the trainer holds; nothing acknowledged was lost")
    text = json.dumps(result, indent=1)
    if json_out == "-":
        typer.echo(text)
    elif json_out:
        Path(json_out).write_text(text + "\n")
    if failed:
        raise typer.Exit(EXIT_VIOLATION)


def _seeds(text: str, seed: int) -> Sequence[int]:
    if not text:
        return [seed]
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise ConfigError(f"--seeds is {text!r}: expected A:B with A below B, such as 0:100")
    return range(int(first), int(end))


def _run_virtual(plan: "Scenario", path: Path, seed: int, options: str) -> "Outcome":
    from sim_cluster.minimise import minimise
    from sim_cluster.swarm import run_virtual

    outcome = run_virtual(plan, seed)
    p99 = "-" if outcome.delay_p99_ms is None else f"{outcome.delay_p99_ms} ms"
    messages = f"{outcome.delivered} messages, {outcome.groups} shared"
    figures = f"{outcome.writes} batches, {messages}, p99 {p99}, {outcome.wall_s:.1f} s"
    typer.echo(f"seed {seed}: {'FAILED' if outcome.problem else 'fine'}  {figures}")
    if outcome.problem:
        typer.echo(f"  at {outcome.at_ms} ms: {outcome.problem}")
        typer.echo(f"  replay: ekko sim run {path} --virtual --seed {seed}{options}")
        faults, runs = minimise(plan, seed, plan.faults(seed))
        typer.echo(f"  after {runs} runs, what is needed of the faults: {faults.network}")
        for event in faults.events:
            typer.echo(f"    {event}")
    return outcome


def _as_json(outcome: "Outcome") -> dict[str, Any]:
    return {
        "seed": outcome.seed,
        "problem": outcome.problem,
        "virtual_ms": outcome.at_ms,
        "trace": outcome.trace,
        "batches": outcome.writes,
        "messages": outcome.delivered,
        "rejected": outcome.rejected,
        "shared": outcome.groups,
        "delay_p99_ms": outcome.delay_p99_ms,
        "seconds": round(outcome.wall_s, 3),
    }
