"""`ekko sink`: a process beside a node that keeps a foreign store as the node is."""

import importlib
import json
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ekko.errors import ConfigError
from ekko.options import JsonOption

if TYPE_CHECKING:  # other commands of `ekko` need not wait for these
    from ekko.serve.feeding import Feed
    from ekko.serve.session import FeedCounts
    from ekko.serve.sink import Sink

SAY_EVERY_S: Final = 10.0
_REDIS: Final = ("redis://", "rediss://", "unix://")


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
    prefix: Annotated[str, typer.Option("--prefix", help="In redis: what all names begin with.")] = "ekko",
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
    from ekko.logs import configure_logs
    from ekko.serve.feeding import Feed

    feed = Feed(run_dir, model, sink_of(target, name or node, prefix), tables=table)
    configure_logs(this_node=node)
    run(feed, every)
    if as_json:
        typer.echo(json.dumps({"model": model, **told(feed.counts)}))


def sink_of(target: str, name: str, prefix: str) -> "Sink":
    """The sink that the command line names.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
    """
    if target.startswith(_REDIS):
        from ekko.sinks import RedisSink

        return RedisSink(target, name=name, prefix=prefix)
    from ekko.serve.sink import Sink

    module, found, function = target.partition(":")
    if not found or not module or not function:
        raise ConfigError(f"{target!r} is no sink: expected redis://HOST:PORT/DATABASE, or MODULE:FUNCTION")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{target!r} cannot be loaded: {error}") from error
    if not isinstance(made, Sink):
        raise ConfigError(f"{target!r} returned a {type(made).__name__}: expected an ekko.serve.Sink")
    return made


def run(feed: "Feed", every_s: float) -> None:
    """Run a feed until a signal; say now and then how it is."""
    import structlog

    log = structlog.get_logger("ekko.sinks")
    ended = threading.Event()

    def say() -> None:
        before, since = feed.counts, time.monotonic()
        while not ended.wait(every_s):
            now, moment = feed.counts, time.monotonic()
            rate = (now.rows - before.rows) / (moment - since)
            (log.warning if now.error else log.info)("sink", model=feed.model, rows_per_s=round(rate), **told(now))
            before, since = now, moment

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: feed.stop())
    teller = threading.Thread(target=say, name="ekko-sink-counts", daemon=True)
    teller.start()
    log.info("sink_begins", model=feed.model)
    try:
        feed.run()
    finally:
        ended.set()
        teller.join()
        log.info("sink_ends", model=feed.model, **told(feed.counts))


def told(counts: "FeedCounts") -> dict[str, object]:
    """What is said of a feed; of its error only if there is one."""
    fields = asdict(counts)
    through_ms = fields.pop("through_ms")
    fields["late_ms"] = max(0, int(time.time() * 1000) - through_ms) if through_ms else None
    return fields if counts.error else {key: value for key, value in fields.items() if key != "error"}
