"""What the demo shows while it runs: a bar for each phase and a line of live figures, on stderr."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

BAR_WIDTH = 20  # what 80 columns leave beside the longest name of a phase


class _Bars(Progress):
    """Bars, and the figures of the phase under way below them."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(f"  {self.figures}", style="cyan")


class Display:
    """A context manager; without a terminal, a line for each phase that is done."""

    def __init__(self, console: Console) -> None:
        self._bars = _Bars(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=BAR_WIDTH),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task: TaskID | None = None
        self._name = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def phase(self, name: str) -> None:
        """Begin the next phase; the one before it is done."""
        self._finish()
        self._name = name
        self._task = self._bars.add_task(name, total=1.0)

    def update(self, fraction: float, figures: str = "") -> None:
        """Show how far the phase is, and what there is to see meanwhile."""
        self._bars.figures = figures
        if self._task is not None:
            self._bars.update(self._task, completed=fraction)

    def warn(self, text: str) -> None:
        """Say something that must not be missed."""
        self._console.print(text, style="bold red", soft_wrap=True)

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=1.0)
            if not self._console.is_terminal:
                self._console.print(f"{self._name}: done. {self._bars.figures}".strip(), soft_wrap=True)
        self._task, self._bars.figures = None, ""
