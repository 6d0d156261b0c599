"""What a run writes down as it goes, and what a person sees of it on the terminal.

`MetricsWriter` keeps metrics.jsonl, which `read_metrics` returns as a data frame. `Console` does
all the printing of a run: stages, progress, tables, messages.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import pandas as pd
import rich.box
import rich.console
from etils import epath
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtllm_jax import distributed
from mtllm_jax.runfolder import Mirror, is_remote, naming, new_file

LOG_WIDTH = 100  # columns of a table where there is no terminal

_MANY_BYTES = 10**9  # what takes long enough to read or write that one wants to know how far it is
_LOG_SECONDS = 10.0  # between two lines about one loop where there is no terminal
_RATE_SAMPLES, _RATE_SPACING = 60, 0.5  # the rate shown is that of the last 60 × 0.5 s


class MetricsWriter:
    """Appends lines to metrics.jsonl, each flushed at once, so that a killed run loses nothing.

    A line is {"step": int, "time": unix seconds, name: number or null, ...}. Opening a file whose
    last line a kill cut off removes that piece. In an object store they are there after `sync`, and
    now and then between.
    """

    def __init__(self, path: epath.PathLike) -> None:
        kept = epath.Path(path)
        self._mirror: Mirror | None = None
        if not is_remote(kept):
            self._path = Path(kept)
        else:
            self._mirror = Mirror(kept.parent)
            self._path = self._mirror.path / kept.name
            if kept.exists():
                self._path.write_bytes(kept.read_bytes())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            _cut_unfinished_line(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line. NaN and infinities become null, as strict JSON readers refuse them.

        Raises ValueError for a value named `step` or `time`: each line has these already.
        """
        line: dict[str, int | float | None] = {"step": int(step), "time": round(time.time(), 3)}
        for name, value in values.items():
            if name in ("step", "time"):
                raise ValueError(f"A metric is named {name!r}; it must be another name.")
            figure = float(value)
            line[name] = figure if math.isfinite(figure) else None
        with naming(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._mirror is not None:
            self._mirror.copy_if_due()

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps beyond `step`, that of the restored checkpoint."""
        self._file.close()
        kept = [text for text, line in _lines(self._path) if line["step"] <= step]
        with new_file(epath.Path(self._path)) as file:
            file.write("".join(kept).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Have all lines so far where `path` says."""
        if self._mirror is not None:
            self._mirror.copy()

    def close(self) -> None:
        with naming(self._path):
            self._file.close()
        self.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def read_metrics(path: epath.PathLike) -> pd.DataFrame:
    """metrics.jsonl with a column each for step, time and every metric; null or absent is NaN.

    A last line still being written is left out. Raises ValueError for any other broken line.
    """
    frame = pd.DataFrame([line for _, line in _lines(epath.Path(path))])
    if frame.empty:
        frame = pd.DataFrame(columns=["step", "time"])
    return frame.astype(float).astype({"step": int})


def _lines(path: Path | epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every finished line, and what it says."""
    with path.open("r", encoding="utf-8") as file:
        for count, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                return
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = None
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError(
                    f"{path}, line {count} is {text.strip()[:40]!r}; it must be a JSON object with "
                    "an integer 'step'."
                )
            yield text, line


def _cut_unfinished_line(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


class Console:
    """All that a run prints; bars on a terminal, plain lines in a log.

    file: where to print; unless given standard output, and of several processes nowhere but in the
      first. Text appears as it is: square brackets are not markup.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        quiet = file is None and not distributed.is_first()
        file = sys.stdout if file is None else file
        if isinstance(file, io.TextIOWrapper):
            # An encoding without "▶" or "±" should cost that character, not the run.
            file.reconfigure(errors="replace")
        self._live = (
            not quiet and file.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        )
        self._rich = rich.console.Console(
            file=file,
            force_terminal=self._live,
            width=None if self._live else LOG_WIDTH,
            markup=False,
            emoji=False,
            highlight=False,
            quiet=quiet,
        )
        self._progress: Progress | None = None

    @property
    def width(self) -> int:
        """Columns there are."""
        return self._rich.width

    def print(self, what: RenderableType = "", style: str | None = None) -> None:
        """Print text, which stays one line and can be copied, or anything that rich can draw."""
        self._rich.print(what, style=style, crop=False, soft_wrap=isinstance(what, str | Text))

    def warn(self, text: str) -> None:
        """Print what the user should know and can do something about."""
        self.print(f"warning: {text}", style="yellow")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = ""
    ) -> None:
        """Print a table, its first column to the left and the others to the right."""
        table = Table(
            title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD
        )
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self.print(table)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator["Stage"]:
        """Print the stage's name and, at its end, how long it took; a bar still open ends there."""
        self.print(f"▶ {name}", style="bold")
        stage = Stage()
        try:
            yield stage
        except BaseException:
            self._end_progress()
            self.print(f"✗ {name}  stopped after {duration(stage.stop())}", style="red")
            raise
        self._end_progress()
        self.print(f"✓ {name}  {duration(stage.stop())}", style="green")

    def progress(self, total: int, what: str, unit: str = "steps", done: int = 0) -> "Progress":
        """Show how far a loop is; the one shown before ends.

        total: units in all. done: of these, the ones an earlier start of the run has finished.
        """
        self._end_progress()
        self._progress = Progress(self._rich, self._live, total, what, unit, done)
        return self._progress

    def progress_of_bytes(self, what: str) -> Callable[[int, int], None]:
        """A function to be told (bytes so far, bytes in all); it shows what takes a while."""
        shown: list[Progress] = []

        def told(done: int, total: int) -> None:
            if total < _MANY_BYTES:
                return
            if not shown:
                shown.append(self.progress(round(total / 1e6), what, unit="MB"))
            shown[0].update(round(done / 1e6))

        return told

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class Stage:
    """The time of one stage: `seconds` so far, or in all once it has stopped."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._end: float | None = None

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self._end is None else self._end) - self._start

    def stop(self) -> float:
        self._end = time.monotonic()
        return self.seconds


class Progress:
    """How far a loop is. Made by `Console.progress`; ends at its total, with its `with` or stage.

    `update` takes notes only: what it was told is drawn four times a second by rich's thread, or
    printed as a line every ten seconds.
    """

    def __init__(
        self,
        console: rich.console.Console,
        live: bool,
        total: int,
        what: str,
        unit: str,
        done: int,
    ) -> None:
        self._console = console
        self._total, self._what, self._unit = total, what, unit
        self._done = done
        self._values: dict[str, float] = {}
        self._start = self._first = (time.monotonic(), done)
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)
        self._printed = (-math.inf, -1)  # when, and how far it was
        self._seconds: float | None = None  # in all, once ended
        self._live: Live | None = None
        if live:
            self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=4)
            self._live.start()

    def update(self, done: int, **values: float) -> None:
        """`done` units are finished; `values`, such as loss=0.31, show until others come."""
        now = time.monotonic()
        self._done = done
        if values:
            self._values = values
        if not self._samples:
            # Before the first unit lies compilation: the rate is counted from there.
            self._first = (now, done)
        if not self._samples or now - self._samples[-1][0] >= _RATE_SPACING or done >= self._total:
            self._samples.append((now, done))
        if done >= self._total:
            self.close()
        elif self._live is None and now - self._printed[0] >= _LOG_SECONDS:
            self._print_line()

    def close(self) -> None:
        """End it, leaving its last state to be seen."""
        if self._seconds is not None:
            return
        self._seconds = time.monotonic() - self._start[0]
        if self._live is not None:
            self._live.stop()
        elif self._done != self._printed[1] or self._done >= self._total:
            self._print_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _print_line(self) -> None:
        self._printed = (time.monotonic(), self._done)
        self._console.print(f"{self._what}  {self._state()}", soft_wrap=True)

    def _draw(self) -> RenderableType:
        state = self._state()
        row: list[RenderableType] = [self._what]
        room = self._console.width - len(self._what) - len(state) - 6
        if room >= 8:
            row.append(ProgressBar(self._total, self._done, width=min(room, 30)))
        row.append(Text(state, no_wrap=True, overflow="ellipsis"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row("", *row)
        return grid

    def _state(self) -> str:
        parts = [f"{self._done}/{self._total} {self._unit}"]
        rate = self._rate()
        if rate > 0:
            parts.append(f"{number(rate)} {self._unit}/s")
        if self._seconds is not None:
            parts.append(clock(self._seconds))
        elif rate > 0:
            parts.append(f"eta {clock((self._total - self._done) / rate)}")
        if self._values:
            values = self._values.items()
            parts.append(" ".join(f"{name} {number(value)}" for name, value in values))
        return "  ".join(parts)

    def _rate(self) -> float:
        """Units per second of late, at the end those of the whole; 0 while not known."""
        if not self._samples:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        if self._seconds is not None:
            first = self._start if last == self._first else self._first
        seconds, units = last[0] - first[0], last[1] - first[1]
        return max(units / seconds, 0.0) if seconds > 0 else 0.0


def number(value: float) -> str:
    """Three figures of it: 0.312, 17.1, 1240."""
    figure = float(value)
    return f"{figure:.0f}" if 100 <= abs(figure) < 1e6 else f"{figure:.3g}"


def clock(seconds: float) -> str:
    """Seconds as 0:29, 12:05 or 1:02:33."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Seconds as 12.3 s, 3 min 12 s or 1 h 02 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"
