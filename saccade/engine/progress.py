"""What a person sees while a run goes on: a bar in a terminal, and lines that stay readable in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 30.0  # between lines where there is no terminal


class RunTable:
    """A line per evaluation; between them a bar (terminal) or now and then a plain line (pipe). All on stderr."""

    def __init__(self, total: int, done: int, *, show: bool = True, counted: str = "pictures"):
        self.total, self.first, self.start = total, done, time.monotonic()
        self.show, self.counted = show, counted
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        self.live: Progress | None = None
        self.bar: TaskID | None = None
        self._last_line = self.start
        self._columns: list[str] = []

    def __enter__(self) -> RunTable:
        if self.show and sys.stderr.isatty():
            self.live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} " + f"{self.counted}/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar = self.live.add_task("train", total=self.total, completed=self.first, loss=float("nan"), speed=0)
            self.live.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, step: int, loss: float, speed: float) -> None:
        """After each step: `step` steps are done."""
        if self.live is not None and self.bar is not None:
            self.live.update(self.bar, completed=step, loss=loss, speed=speed)
        elif self.show and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            pace = f"{speed:.0f} {self.counted}/s"
            self.say(f"  step {step}/{self.total}  loss {loss:.3f}  {pace}  left {self.left(step)}")

    def row(self, step: int, epoch: float, values: dict[str, float], best: bool) -> None:
        """After an evaluation."""
        cells = {
            "step": f"{step}/{self.total}",
            "epoch": f"{epoch:.1f}",
            **{name: _figure(name, value) for name, value in values.items()},
            "left": self.left(step),
        }
        if list(cells) != self._columns:
            self._columns = list(cells)
            self.say("  ".join(name.rjust(_width(name)) for name in cells))
        line = "  ".join(cell.rjust(_width(name)) for name, cell in cells.items())
        self.say(line + ("  *" if best else ""))
        self._last_line = time.monotonic()

    def left(self, step: int) -> str:
        """Time left at the speed so far, as m:ss or h:mm:ss."""
        done = step - self.first
        if done <= 0:
            return "?"
        return clock((time.monotonic() - self.start) / done * (self.total - step))


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _figure(name: str, value: float) -> str:
    if "top" in name or name.endswith("cut"):
        return f"{100 * value:.1f}%"
    return f"{value:.1e}" if name == "lr" else f"{value:.3f}"


def _width(name: str) -> int:
    return max(len(name), {"step": 13, "left": 8, "lr": 8}.get(name, 7))


@contextmanager
def counter(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that shows how far a pass over pictures has come, and the time left. On stderr."""
    if sys.stderr.isatty():
        console = Console(stderr=True)
        columns = [TextColumn(verb), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}")]
        times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        with Progress(*columns, *times, console=console, transient=True) as bar:
            task = bar.add_task(verb, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    start = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > PLAIN_SECONDS:
            last = now
            print(f"{verb}: {done}/{total}, left {clock((now - start) / done * (total - done))}", file=sys.stderr)

    yield line
