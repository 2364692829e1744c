"""The `ekko` command. Subcommands of other packages come from the entry-point group `ekko.commands`."""

import json
import sys
import urllib.parse
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ekko.asking import ask_node, fetch_status
from ekko.errors import ConfigError, EkkoError, NodeFailed
from ekko.health.cli import health
from ekko.options import ConfigOption, HttpOption, JsonOption, http_of
from ekko.rollback.cli import rollback
from ekko.sinks.cli import sink
from ekko.snapshots.cli import snapshots
from ekko.version import __version__

EXIT_MISTAKE = 2  # what the user gave, or the environment, is at fault; one line says how
EXIT_FAILED = 3  # the node stopped by itself to protect its data
EXIT_INTERRUPTED = 130
MEMORY_DIR = Path("/dev/shm")  # noqa: S108 - the tmpfs that Linux has for shared memory

app = typer.Typer(
    name="ekko",
    help="Carries each changed embedding row from training to every serving replica, peer to peer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(snapshots, name="snapshot")
app.command()(health)
app.command()(rollback)
app.command()(sink)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ekko {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Carries each changed embedding row from training to every serving replica, peer to peer."""


@app.command()
def node(
    config: Annotated[Path, typer.Option("--config", "-c", help="The node's TOML file.", metavar="FILE")],
    check: Annotated[bool, typer.Option("--check", help="Check the file and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: one JSON object.")] = False,
) -> None:
    """Run a node until SIGTERM or Ctrl-C. It is ready when GET /readyz answers 200.

    Exit codes: 0 stopped on request, 2 a mistake in configuration or environment, 3 stopped to protect its data.

    Variables EKKO_NODE__ID, EKKO_NODE__HTTP, EKKO_MODELS__<name>__SHARDS ... override the file.
    """
    from ekko.startup import brisk_imports

    with brisk_imports():
        import asyncio

        import uvloop

        from ekko.config import load_config
        from ekko.daemon import Node
        from ekko.logs import configure_logs

    settings = load_config(config)
    if check:
        own, models = settings.node, [*settings.models]
        answer = {"file": str(config), "node": own.id, "role": own.role, "region": own.region, "models": models}
        fine = f"{config}: fine: node {own.id!r}, role {own.role!r}, region {own.region!r}"
        typer.echo(json.dumps(answer) if as_json else fine)
        return
    configure_logs(this_node=settings.node.id)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Node(settings).run())


@app.command()
def keygen(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the secret key goes.", metavar="FILE")] = Path("node.key"),
    as_json: JsonOption = False,
) -> None:
    """Make a node's key: a secret file for [security].key_file, and a public one beside it for every node's allow folder.

    The public file's name says whose key it is: call it NODE.pub, or NODE@ANYTHING.pub where NODE has another key already.
    """
    from ekko.security import generate

    public = generate(out)
    if as_json:
        typer.echo(json.dumps({"secret": str(out), "public": str(public)}))
        return
    typer.echo(f"secret key: {out} (for key_file; keep it)")
    typer.echo(f"public key: {public} (copy it as NODE.pub into every node's allow folder)")


@app.command()
def status(
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a node says of itself: members, models, peers, queues."""
    answer = fetch_status(http_of(config, http))
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    from ekko.display import print_status

    print_status(answer)


@app.command()
def expel(
    node: Annotated[str, typer.Argument(help="The id of the member.", metavar="NODE")],
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Expel a node that is down for good, or out of reach for too long: its writers are retired, and nobody waits for it.

    Ask any node of the cluster, on its own machine. Should the expelled one come back, it drops what it holds and joins anew.
    """
    answer = ask_node(http_of(config, http), "/expel", {"node": node})
    if as_json:
        typer.echo(json.dumps(answer))
        return
    typer.echo(f"node {answer['node']} is expelled; {answer['writers']} of its writers are being retired")


@app.command()
def fence(
    model: Annotated[str, typer.Argument(help="The model.", metavar="MODEL")],
    note: Annotated[str, typer.Option("--note", help="Why, for people and for publishers that are refused.")] = "",
    epoch: Annotated[int, typer.Option("--epoch", help="Of a fence that was asked for before; 0: a new one.")] = 0,
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop all writers of a model until the fence is lifted (`ekko lift`); what they have published is on all members then.

    `ekko rollback` does this by itself. Asked again with the same epoch, it says how far the same fence is.
    """
    answer = ask_node(http_of(config, http), "/fence", {"model": model, "note": note, "epoch": epoch})
    if as_json:
        typer.echo(json.dumps(answer))
        return
    waits = f"; it waits for {', '.join(answer['waits_for'])}" if answer["waits_for"] else ""
    state = "is closed" if answer["closed"] else f"is closing{waits}: ask again with --epoch {answer['epoch']}"
    typer.echo(f"the fence of epoch {answer['epoch']} before model {answer['model']} {state}")


@app.command()
def lift(
    model: Annotated[str, typer.Argument(help="The model.", metavar="MODEL")],
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the writers of a fenced model go on, under fresh ids."""
    answer = ask_node(http_of(config, http), "/lift", {"model": model})
    typer.echo(json.dumps(answer) if as_json else f"the fence of epoch {answer['epoch']} is lifted: model {model} is written")


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    memory_dir: Annotated[Path, typer.Option("--memory-dir", help="The tmpfs with the shared memory.")] = MEMORY_DIR,
    as_json: JsonOption = False,
) -> None:
    """Remove shared memory that dead nodes of this machine left behind.

    Only what no living node uses and no run_dir names: what a stopped node would take up again stays.
    """
    from ekko.display import print_stores
    from ekko.store.leftovers import State, find_stores, remove

    if not memory_dir.is_dir():
        raise ConfigError(f"--memory-dir: {memory_dir} is not a directory: name a mounted tmpfs")
    stores = find_stores(memory_dir)
    freed = 0
    for store in stores:
        if store.state is State.LEFTOVER:
            freed += store.bytes if dry_run else remove(store)
    if as_json:
        listed = [
            {
                "prefix": store.prefix,
                "state": store.state.value,
                "run_dir": None if store.run_dir is None else str(store.run_dir),
                "files": len(store.files),
                "bytes": store.bytes,
            }
            for store in stores
        ]
        typer.echo(json.dumps({"stores": listed, "freed_bytes": freed, "dry_run": dry_run}, indent=2))
        return
    print_stores(stores, freed, dry_run=dry_run)


@app.command()
def load(
    model: Annotated[str, typer.Argument(help="The model; it is made when there is none.", metavar="MODEL")],
    file: Annotated[Path, typer.Argument(help=".safetensors, .npy, .pt or .pth.", metavar="FILE")],
    table: Annotated[
        list[str] | None,
        typer.Option("--table", "-t", help="Rows of another table.", metavar="TENSOR=TABLE"),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--keys",
            "-k",
            help="Keys of a table's rows, one for each: a .npy or other file with one tensor, or a tensor of FILE by its name. "
            "Several tables: TABLE=KEYS, for each.",
            metavar="[TABLE=]KEYS",
        ),
    ] = None,
    codec: Annotated[str | None, typer.Option("--codec", help="Of a model that is new; else float32.")] = None,
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a model from a file of this machine into a training node, at the speed of the file; other nodes pull it from there.

    Tensors become tables that have their name, or that --table names, or that have NAME.keys beside them; all others are dense.
    A row's key is its number, unless there are NAME.keys or --keys. Of a key that comes twice the last row counts.
    """
    from ekko.model import check_codec, check_name
    from ekko.snapshots.commands import load_now

    tables = {}
    for pair in table or []:
        tensor, found, name = pair.rpartition("=")
        if not found or not tensor:
            raise ConfigError(f"--table {pair}: expected TENSOR=TABLE")
        tables[tensor] = check_name("table", name)
    where = {}
    for one in keys or []:
        of, _, place = one.rpartition("=") if not Path(one).is_file() else ("", "", one)
        if of in where:
            raise ConfigError(f"--keys {one}: keys of {of or 'the table'} are given already")
        # The node has another working directory.
        where[of] = str(Path(place).absolute()) if Path(place).is_file() else place
    names = {"model": check_name("model", model), "file": str(file.absolute())}
    request = {**names, "tables": tables, "keys": where, "codec": codec and check_codec("model", model, codec)}
    done = load_now(http_of(config, http), request, quiet=as_json)
    typer.echo(json.dumps(done) if as_json else f"{done['rows']:,} rows of {file} are in model {model!r}")


@app.command()
def hot(
    model: Annotated[str, typer.Argument(help="The model.", metavar="MODEL")],
    table: Annotated[str | None, typer.Argument(help="One of its tables; all without.", metavar="TABLE")] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="How many keys.", min=0, max=1024)] = 20,
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which keys the readers of a node ask for most, and how much each table is read.

    Counts are estimates from a sample; they fade by half in node.hot_half_life_s (10 minutes).
    """
    ask = {"model": model, "count": str(count)} | ({} if table is None else {"table": table})
    answer = ask_node(http_of(config, http), f"/hot?{urllib.parse.urlencode(ask)}")
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    from ekko.display import print_hot

    print_hot(answer)


@app.command()
def alias(
    name: Annotated[
        str | None, typer.Argument(help="The alias; none: list all.", metavar="[ALIAS]", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Argument(help="The model that it is to stand for.", metavar="[MODEL]")] = None,
    back: Annotated[bool, typer.Option("--back", help="Switch to the model that it stood for before.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="The name is no alias any more.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also while some node has not caught up with the model.")] = False,
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Switch what a name stands for to another model, on all nodes at once; without a name, list the aliases.

    Readers of the alias follow between two look-ups. The model that it stood for stays, for `ekko alias NAME --back`, until it
    is dropped (`ekko drop`).
    """
    address = http_of(config, http)
    if name is None:
        _list_aliases(address, as_json)
        return
    if (model is not None) + back + remove != 1:
        raise ConfigError("give either the model that the alias is to stand for, or --back, or --remove")
    answer = ask_node(address, "/alias", {"alias": name, "model": model, "back": back, "remove": remove, "force": force})
    if as_json:
        typer.echo(json.dumps(answer))
        return
    moment = datetime.fromtimestamp(answer["switches_ms"] / 1000, UTC).strftime("%H:%M:%S.%f")[:-3]
    before = f"; the way back is {answer['before']}" if answer["before"] else ""
    what = f"stands for model {answer['model']}" if answer["model"] else "is no alias any more"
    typer.echo(f"{name} {what} from {moment} UTC on{before}")
    if answer["silent"]:
        typer.echo(f"silent, and not waited for: {', '.join(answer['silent'])}")


def _list_aliases(address: str, as_json: bool) -> None:
    aliases = fetch_status(address).get("aliases", {})
    if as_json:
        typer.echo(json.dumps(aliases, indent=2))
    elif aliases:
        from rich.console import Console

        from ekko.display import aliases_table

        Console().print(aliases_table(aliases))
    else:
        typer.echo("there are no aliases")


@app.command()
def drop(
    model: Annotated[str, typer.Argument(help="The model, or one of its tables.", metavar="MODEL[/TABLE]")],
    force: Annotated[
        bool, typer.Option("--force", help="Also the way back of an alias, or a table of what it stands for.")
    ] = False,
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drop a model, or a table of it, on all nodes, for good: its memory is freed, its publishers and readers are told.

    Nodes that are away drop it when they come back. The name may be used again, for another model or table.
    """
    answer = ask_node(http_of(config, http), "/drop", {"model": model, "force": force})
    if as_json:
        typer.echo(json.dumps(answer))
        return
    what = "table" if "/" in model else "model"
    typer.echo(f"{what} {model} is dropped; it had {answer['bytes']:,} bytes of shared memory on this node")


@app.command()
def rate(
    pair: Annotated[
        str | None, typer.Argument(help="Two regions; none: list all.", metavar="[REGION/REGION]", show_default=False)
    ] = None,
    mbps: Annotated[
        str | None,
        typer.Argument(
            help="Mbit/s, each way; none: no limit; configured: as each node's own file says.",
            metavar="[MBPS|none|configured]",
        ),
    ] = None,
    config: ConfigOption = None,
    http: HttpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how much of the way between two regions updates may use, on all nodes, from now on; without a rate, show them.

    It counts before links."A/B".rate_mbps of the nodes' files, also after they start again, until `configured`.
    """
    from ekko.rates import parse_pair, parse_word

    address = http_of(config, http)
    if pair is not None and mbps is not None:
        answer = ask_node(address, "/rate", {"pair": parse_pair(pair), "rate": str(parse_word(mbps))})
        regions, limit = " and ".join(answer["pair"].split("/")), answer["rate_mbps"]
        may = "have no limit" if limit is None else f"may use {limit:g} Mbit/s each way"
        typer.echo(json.dumps(answer) if as_json else f"updates between {regions} {may}")
        return
    rates = fetch_status(address).get("rates", {})
    if pair is not None:
        rates = {name: one for name, one in rates.items() if name == parse_pair(pair)}
    if as_json:
        typer.echo(json.dumps(rates, indent=2))
    elif rates:
        from rich.console import Console

        from ekko.display import rates_table

        Console().print(rates_table(rates))
    else:
        typer.echo("no rate is set")


def register_commands() -> None:
    """Add the subcommands of other packages; one that cannot be loaded says why when it is called."""
    for entry in sorted(entry_points(group="ekko.commands"), key=lambda entry: entry.name):
        try:
            entry.load()(app)
        except (ImportError, AttributeError) as error:
            _register_broken(entry.name, f"the command {entry.name!r} of {entry.value} cannot be loaded: {error}")


def _register_broken(name: str, reason: str) -> None:
    @app.command(name, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def broken() -> None:
        raise EkkoError(reason)


def main() -> NoReturn:
    """Run the command line; a mistake of the user is one line on stderr."""
    try:
        register_commands()
        app()
        code = 0
    except EkkoError as error:
        sys.stderr.write(f"ekko: {error}\n")
        code = EXIT_FAILED if isinstance(error, NodeFailed) else EXIT_MISTAKE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
