"""The two consoles, progress, and results. stdout is the answer; stderr is the conversation.

Imported inside command bodies only: rich is not needed to parse a command line.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from coral_cli.fitting import fitted
from coral_core import progress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines where there is no terminal to draw bars on."""


@contextlib.contextmanager
def progress_bars(console: Console = err) -> Iterator[progress.Progress]:
    """Yield a Progress that draws one bar per stage on a terminal, or else writes a plain line now and then."""
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Count(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[numbers]}", style="dim"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
            if stage in tasks and done < bars.tasks[bars.task_ids.index(tasks[stage])].completed:
                bars.reset(tasks[stage])  # the next round of this stage starts its own clock
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None, completed=done, numbers="")
            bars.update(tasks[stage], completed=done, total=total or None, numbers=numbers_text(numbers))

        yield show


class _Count(ProgressColumn):
    """done/total; rich's own column has no place for an unknown total."""

    def render(self, task: Task) -> Text:
        return Text(_count(int(task.completed), int(task.total or 0)), style="progress.download")


class _PlainLines:
    """A Progress for logs: the first call of a stage, its end, and one line every PLAIN_EVERY_S between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begun_s: dict[str, tuple[float, int]] = {}
        self.last_s: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        now_s = time.monotonic()
        begun_s, begun_done = self.begun_s.setdefault(stage, (now_s, done))
        ended = done == total and total > 0
        if not ended and now_s - self.last_s.get(stage, float("-inf")) < PLAIN_EVERY_S:
            return
        self.last_s[stage] = now_s
        parts = [f"{stage} {_count(done, total)}"]
        if ended:
            parts.append(f"took {duration_text(now_s - begun_s)}")
            del self.begun_s[stage], self.last_s[stage]  # the next round of this stage starts its own clock
        elif done > begun_done and total:
            left_s = (now_s - begun_s) / (done - begun_done) * (total - done)
            parts.append(f"{duration_text(left_s)} left")
        if numbers:
            parts.append(numbers_text(numbers))
        self.console.print(", ".join(parts), markup=False, soft_wrap=True)


def _count(done: int, total: int) -> str:
    return f"{done:,}/{total:,}" if total else f"{done:,}"


def duration_text(seconds: float) -> str:
    """42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_text(size_bytes: int) -> str:
    """1.5 GB, 20.0 MB, 3.1 kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= size:
            return f"{size_bytes / size:,.1f} {unit}"
    return f"{size_bytes / 1e3:,.1f} kB"


def numbers_text(numbers: dict[str, float]) -> str:
    """'230 tokens/s, loss 1.23' from {"tokens_per_s": 230, "loss": 1.23}."""
    parts = []
    for name, value in numbers.items():
        shown = f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"
        rate = name.removesuffix("_per_s")
        parts.append(f"{name.replace('_', ' ')} {shown}" if rate == name else f"{shown} {rate.replace('_', ' ')}/s")
    return ", ".join(parts)


def tell(text: str, style: str = "") -> None:
    """Text on stderr as it is, in one line however long: a path or a command in it can be copied. '' is not said."""
    if text:
        err.print(text, style=style, markup=False, soft_wrap=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table on stdout: the first column to the left, the others to the right."""
    from coral_core.report.tables import table

    print_markdown(table(header, rows) + "\n")


def print_markdown(text: str) -> None:
    """Markdown on stdout; on a terminal its tables are made to fit."""
    shown = fitted(text, out.width) if out.is_terminal else text
    out.print(shown, markup=False, soft_wrap=True, end="")


def print_json(value: Any) -> None:
    """One JSON object on stdout, never wrapped or coloured."""
    out.print(json.dumps(value, indent=2, ensure_ascii=False), markup=False, soft_wrap=True)
