"""`ekko sink`: a process beside a node that keeps a foreign store as the node is."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ekko.errors import ConfigError
from ekko.options import JsonOption
from ekko.sinks.target import PREFIX_DEFAULT

if TYPE_CHECKING:  # other commands of `ekko` need not wait for these
    from ekko.serve.session import FeedCounts

SAY_EVERY_S: Final = 10.0


def sink(
    model: Annotated[str, typer.Argument(help="The model; not an alias.", metavar="MODEL")],
    target: Annotated[
        str,
        typer.Argument(
            help="redis://HOST:PORT/DATABASE, or MODULE:FUNCTION of yours that returns an ekko.serve.Sink.",
            metavar="TARGET",
            envvar="EKKO_SINK_TARGET",  # where a password in it is not for all to see
        ),
    ],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The node's TOML file.", metavar="FILE")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="The node's run_dir.", metavar="DIR")] = None,
    table: Annotated[
        list[str] | None, typer.Option("--table", "-t", help="Feed this table only; may be given again.", metavar="TABLE")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="In redis: of this feed; else the node's id.", metavar="NAME")
    ] = None,
    prefix: Annotated[str, typer.Option("--prefix", help="In redis: what all names begin with.")] = PREFIX_DEFAULT,
    every: Annotated[float, typer.Option("--every", help="Seconds between two lines of counts.", min=0.1)] = SAY_EVERY_S,
    as_json: JsonOption = False,
) -> None:
    """Keep a foreign store as a model of the node on this machine is, until SIGTERM or Ctrl-C.

    The node may be started, stopped and restarted meanwhile, and so may the store. One that begins again goes on where the
    last one of its name ended. Run one for each model and store. Its log says now and then how it is; with --json, so does one
    object when it ends.
    """
    if (config is None) == (run_dir is None):
        raise ConfigError("give either --config FILE or --run-dir DIR")
    node = "feed"
    if config is not None:
        from ekko.config import load_config

        settings = load_config(config).node
        run_dir, node = settings.run_dir, settings.id
    assert run_dir is not None
    import structlog

    from ekko.logs import configure_logs
    from ekko.serve.feeding import Feed
    from ekko.sinks.running import run, sink_of

    feed = Feed(run_dir, model, sink_of(target, name or node, prefix), tables=table)
    configure_logs(this_node=node)
    log = structlog.get_logger("ekko.sinks")

    def tell(counts: "FeedCounts", rows_per_s: int) -> None:
        (log.warning if counts.error else log.info)("sink", model=model, rows_per_s=rows_per_s, **told(counts))

    log.info("sink_begins", model=model)
    run(feed, every, tell)
    log.info("sink_ends", model=model)
    if as_json:
        typer.echo(json.dumps({"model": model, **told(feed.counts)}))


def told(counts: "FeedCounts") -> dict[str, object]:
    """What is said of a feed; of its error only if there is one."""
    fields = asdict(counts)
    through_ms = fields.pop("through_ms")
    fields["late_ms"] = max(0, int(time.time() * 1000) - through_ms) if through_ms else None
    return fields if counts.error else {key: value for key, value in fields.items() if key != "error"}
