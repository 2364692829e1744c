"""`ekko snapshot`: take one now, list, verify, export, restore."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ekko.options import ConfigOption, HttpOption, JsonOption, http_of

snapshots = typer.Typer(
    help="Snapshots: take one now, list, verify, restore.", invoke_without_command=True, rich_markup_mode=None
)
FolderArgument = Annotated[str, typer.Argument(help="The folder or URL that has the snapshots.", metavar="URL")]


@snapshots.callback()
def _snapshot(
    context: typer.Context,
    config: ConfigOption = None,
    http: HttpOption = None,
    full: Annotated[bool, typer.Option("--full", help="A full one, not an increment.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Have a running node take a snapshot now, and wait for it."""
    if context.invoked_subcommand is not None:
        return
    from ekko.snapshots.commands import take_now

    done = take_now(http_of(config, http), full=full, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(done))
        return
    kind = "full snapshot" if done["full"] else "increment"
    typer.echo(f"{kind} {done['name']}: {done['rows']:,} rows, {done['bytes']:,} bytes in {done['seconds']:.2f} s")


@snapshots.command("list")
def snapshot_list(url: FolderArgument, as_json: JsonOption = False) -> None:
    """What snapshots there are, oldest first."""
    from ekko.snapshots.commands import listed

    found = listed(url)
    if as_json:
        typer.echo(json.dumps({"snapshots": found}))
        return
    for one in found:
        typer.echo("  ".join(f"{key}={value}" for key, value in one.items() if value not in (None, "")))
    if not found:
        typer.echo(f"there are no snapshots in {url}")


@snapshots.command("verify")
def snapshot_verify(
    url: FolderArgument,
    name: Annotated[str | None, typer.Argument(help="Which; else the newest.", metavar="NAME")] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a snapshot with all that it stands on, and check every checksum."""
    from ekko.snapshots.commands import verify

    done = verify(url, name, quiet=as_json)
    typer.echo(
        json.dumps(done) if as_json else f"snapshot {done['name']} is sound: {done['rows']:,} rows, {done['bytes']:,} bytes"
    )


@snapshots.command("export")
def snapshot_export(
    url: FolderArgument,
    model: Annotated[str, typer.Argument(help="Which model.", metavar="MODEL")],
    file: Annotated[Path, typer.Argument(help="The .safetensors file to write.", metavar="FILE")],
    as_json: JsonOption = False,
) -> None:
    """Write a model of the newest sound snapshot to a safetensors file, which `ekko load` brings back."""
    from ekko.snapshots.commands import bar
    from ekko.snapshots.export import export

    with bar("export", quiet=as_json) as progress:
        done = export(url, model, file, progress)
    typer.echo(json.dumps(done) if as_json else f"{done['rows']:,} rows of snapshot {done['name']} are in {file}")


@snapshots.command("restore")
def snapshot_restore(
    url: FolderArgument,
    config: Annotated[Path, typer.Option("--config", "-c", help="Of the node that is to begin with it.", metavar="FILE")],
    as_json: JsonOption = False,
) -> None:
    """Fill the memory of a node that does not run, and has none, with the newest sound snapshot; then start the node."""
    from ekko.config import load_config
    from ekko.snapshots.commands import restore

    settings = load_config(config)
    specs = {name: model.spec(name) for name, model in settings.models.items()}
    hold = {name: model.held for name, model in settings.models.items()}
    done = restore(url, settings.node.run_dir, settings.node.id, specs, hold, quiet=as_json)
    typer.echo(
        json.dumps(done) if as_json else f"snapshot {done['name']} is in the memory of node {settings.node.id!r}: start it"
    )
