"""`ekko demo`: the command. It imports nothing heavy before it is called, since every `ekko` command loads this module."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ekko.errors import ConfigError, EkkoError

if TYPE_CHECKING:
    from rich.console import Console

QUICK_EVENTS: Final = 10_000
QUICK_DELAYS: Final = (1_000, 5_000)  # ten thousand events late would be frozen
RATE_MIN: Final = 500.0
CODEC_NAMES: Final = ("float32", "float16", "bfloat16", "int8")  # `ekko.model.CODECS`, which imports NumPy
EXIT_INTERRUPTED: Final = 130
EXIT_UNEQUAL: Final = 1  # replicas differ, or a corrupted model was not taken back


class Chapter(StrEnum):
    """What the demo shows."""

    FRESHNESS = "freshness"
    ROLLBACK = "rollback"


def register(app: typer.Typer) -> None:
    """Add `ekko demo` to the `ekko` command."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.json and the pictures.", metavar="DIR")] = Path(
        "ekko-demo"
    ),
    chapter: Annotated[
        Chapter,
        typer.Option("--chapter", help="freshness: what fresh rows are worth; rollback: a feed goes bad in mid-stream."),
    ] = Chapter.FRESHNESS,
    quick: Annotated[
        bool, typer.Option("--quick", help="Stream only the last 10,000 events; of chapter rollback, only one fault.")
    ] = False,
    rate: Annotated[
        float, typer.Option("--rate", help="Events per second, at least 500; chapter rollback has its own.")
    ] = RATE_MIN,
    seed: Annotated[int, typer.Option("--seed", help="Of the model and the bootstrap.")] = 0,
    kill: Annotated[bool, typer.Option("--kill", help="Kill -9 a serving node in mid-stream; restart it after 5 s.")] = False,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Use generated events, not MovieLens.")] = False,
    codec: Annotated[
        str, typer.Option("--codec", help="How rows are stored and sent: " + ", ".join(CODEC_NAMES) + ".")
    ] = CODEC_NAMES[0],
    device: Annotated[
        str,
        typer.Option("--device", help="Look rows up on a device of each region: host-twin, or cuda:0.", metavar="NAME"),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of tables.")] = False,
) -> None:
    """The whole system on this machine: a trainer, seven nodes in four regions, and what fresh rows are worth.

    MovieLens-100K in time order: 60 % are learnt offline, the rest streams. Every region predicts each event with the rows it
    has at that moment, before the trainer learns it. Compared with that: the same model with older rows.

    With --chapter rollback the trainer's feed goes bad three times: shuffled labels, exploding gradients, a slow drift. The
    model is judged by its answers and taken back by itself; compared with that: the same without anybody who looks.
    """
    if rate < RATE_MIN:
        raise ConfigError(f"--rate is {rate:g}: expected at least {RATE_MIN:g} events per second")
    if chapter is Chapter.ROLLBACK:
        _rollback(out, quick=quick, seed=seed, synthetic=synthetic, as_json=as_json)
        return
    try:
        from rich.console import Console

        from sim_cluster.demo.display import Display
        from sim_cluster.demo.report import print_result
        from sim_cluster.demo.run import Options, run_demo
    except ImportError as error:
        raise _missing(error) from None
    if codec not in CODEC_NAMES:
        raise ConfigError(f"--codec is {codec!r}: expected one of {', '.join(CODEC_NAMES)}")
    options = Options(out=out, rate=rate, seed=seed, kill=kill, synthetic=synthetic, codec=codec, device=device)
    if quick:
        options = Options(out, QUICK_EVENTS, QUICK_DELAYS, rate, seed, kill, synthetic, codec, device)
    with _stopped_in_a_line(), Display(Console(stderr=True)) as display:
        result = run_demo(options, display)
    shown = None if as_json else partial(print_result, result)
    _show(result.to_json(), shown, out, "latency.png", "auc.png", fine=result.all_equal)


def _rollback(out: Path, *, quick: bool, seed: int, synthetic: bool, as_json: bool) -> None:
    """The chapter in which the model is taken back."""
    try:
        from rich.console import Console

        from sim_cluster.demo.display import Display
        from sim_cluster.demo.rollback.plan import QUICK_STAGES, STAGES
        from sim_cluster.demo.rollback.report import print_result
        from sim_cluster.demo.rollback.run import Options, run_rollback
    except ImportError as error:
        raise _missing(error) from None
    options = Options(out, QUICK_STAGES if quick else STAGES, seed=seed, synthetic=synthetic)
    with _stopped_in_a_line(), Display(Console(stderr=True)) as display:
        result = run_rollback(options, display)
    shown = None if as_json else partial(print_result, result)
    _show(result.to_json(), shown, out, "rollback.png", fine=result.restored)


def _show(report: dict[str, Any], shown: Callable[["Console"], None] | None, out: Path, *pictures: str, fine: bool) -> None:
    """Say how a chapter ended: as tables, or, without `shown`, as JSON; and by the exit code."""
    from rich.console import Console

    if shown is None:
        typer.echo(json.dumps(report, indent=2))
    else:
        console = Console(highlight=False)
        shown(console)
        console.print(f"Written: {', '.join(str(out / name) for name in ('report.json', *pictures))}", soft_wrap=True)
    if not fine:
        raise typer.Exit(EXIT_UNEQUAL)


@contextmanager
def _stopped_in_a_line() -> Iterator[None]:
    """Ctrl-C: by then the chapter has cleaned up after itself."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Interrupted: all processes have ended, and their memory is given back.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _missing(error: ImportError) -> EkkoError:
    return EkkoError(f"the demo needs more packages ({error}): pip install 'ekko-dissemination[demo]'")
