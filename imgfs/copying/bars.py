"""Bars at a terminal; apart, because only there rich is paid for."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from imgfs.copying.progress import Copy, Reporter, summary
from imgfs.units import format_size


class _Rate(TextColumn):
    """As all other sizes here: rich's own counts in thousands."""

    def __init__(self) -> None:
        super().__init__("", table_column=Column(justify="right", no_wrap=True))

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(
            "" if rate is None else f"{format_size(int(rate))}/s", style="progress.data.speed"
        )


class Bars(Reporter):
    """A bar for each copy that is under way, and for several one of all."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[done]}"),
            _Rate(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            expand=True,
            transient=count > 1,
        )
        self._tasks: dict[Copy, TaskID] = {}
        self._known = 0
        self._data = 0
        self._moved = 0
        self._all = self._add("all", None) if count > 1 else None
        self._progress.start()

    def _add(self, name: str, total: int | None) -> TaskID:
        return self._progress.add_task(name, total=total, done="")

    def begin(self, copy: Copy) -> None:
        self._tasks[copy] = self._add(copy.name, copy.data)
        self._known += 1
        self._data += copy.data
        self._moved += copy.resumed
        self._show(copy)

    def advance(self, copy: Copy) -> None:
        self._show(copy)

    def _show(self, copy: Copy) -> None:
        task = self._tasks[copy]
        before = int(self._progress.tasks[self._progress.task_ids.index(task)].completed)
        self._moved += copy.done - before - (copy.resumed if not before else 0)
        told = f"{format_size(copy.done)} of {format_size(copy.data)}"
        if copy.verified:
            told = f"{format_size(copy.verified)} compared"
        self._progress.update(task, completed=copy.done, done=told)
        self._show_all()

    def _show_all(self) -> None:
        if self._all is not None:
            # Of those that were not opened yet: as much as of the others.
            expected = self._data * self.count // max(1, self._known)
            told = f"{format_size(self._moved)}, {self.ended} of {self.count} images"
            told += f", {self.failed} failed" if self.failed else ""
            self._progress.update(self._all, completed=self._moved, total=expected, done=told)

    def _ended(self, copy: Copy, error: str) -> None:
        task = self._tasks.pop(copy, None)
        if task is not None and (self.count > 1 or error):
            self._progress.remove_task(task)
        if self.count > 1:
            self._say(f"{copy.name}: failed: {error}" if error else summary(copy))
        self._show_all()

    def note(self, text: str) -> None:
        self._say(f"imgfs: {text}")

    def tell(self, text: str) -> None:
        self.note(text)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
