"""What the demo shows while it runs: one progress bar, on stderr."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """A bar for the phase under way, and a line for each phase that is done. A context manager."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", style="cyan"),
            console=console,
            # A terminal's width is unknown where there is none; then only what is done is worth a line.
            disable=not console.is_terminal,
        )
        self._console = console
        self._task: TaskID | None = None
        self._name = ""
        self._figures = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def phase(self, name: str) -> None:
        """Begin the next phase; the one before it is done."""
        self._finish()
        self._name, self._figures = name, ""
        self._task = self._progress.add_task(name, total=1.0, figures="")

    def update(self, fraction: float, figures: str = "") -> None:
        """Show how far the phase is, and what there is to see meanwhile."""
        self._figures = figures
        if self._task is not None:
            self._progress.update(self._task, completed=fraction, figures=figures)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1.0, figures=self._figures)
            if not self._console.is_terminal:
                self._console.print(f"{self._name}: done. {self._figures}".strip())
        self._task = None
