"""`scripts/bench NAME [--json OUT|-] [--quick]`."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import common


def main() -> None:
    """Run one benchmark; print a table for people, and one JSON object for machines where asked."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Run one benchmark of ekko.")
    parser.add_argument("name", choices=common.names(), metavar="NAME", help=", ".join(common.names()))
    parser.add_argument("--json", metavar="OUT", help="write one JSON object to this file, or to standard output with -")
    parser.add_argument("--quick", action="store_true", help="the tiny size that runs under test; its figures mean little")
    arguments = parser.parse_args()
    result = common.measure(arguments.name, arguments.quick)
    text = json.dumps(result, indent=1)
    # With the JSON on standard output, the table goes where it cannot get in its way.
    show(result, Console(stderr=arguments.json == "-"))
    if arguments.json == "-":
        sys.stdout.write(text + "\n")
    elif arguments.json:
        Path(arguments.json).write_text(text + "\n")


def show(result: dict[str, object], console: Console) -> None:
    """Print the figures next to their targets, and the cells of a grid below them."""
    name, figures, environment = result["name"], result["figures"], result["environment"]
    assert isinstance(name, str)
    assert isinstance(figures, dict)
    assert isinstance(environment, dict)
    targets = common.targets(name)
    summary = Table("figure", "measured", "target", "", title=f"{name} ({environment['commit']}, {environment['cores']} cores)")
    for figure, value in figures.items():
        if isinstance(value, list | dict):
            continue
        target = targets.get(figure, "")
        verdict = "" if not target or environment["quick"] else _verdict(value, target)
        summary.add_row(figure, _number(value), target, verdict)
    console.print(summary)
    for figure, value in figures.items():
        cells = _cells(value)
        if cells:
            grid = Table(*cells[0], title=figure)
            for cell in cells:
                grid.add_row(*(_number(value) for value in cell.values()))
            console.print(grid)


def _cells(value: object) -> list[dict[str, object]]:
    """The rows of a grid: a figure may be a list of them, or a dictionary of values or of rows."""
    if isinstance(value, dict):
        rows = all(isinstance(row, dict) for row in value.values())
        return [{"": name, **row} for name, row in value.items()] if rows else [value]
    return value if isinstance(value, list) else []


def _verdict(value: float | None, target: str) -> str:
    if value is None:
        return "not measured"
    return "met" if common.meets(value, target) else "NOT MET"


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


if __name__ == "__main__":
    main()
