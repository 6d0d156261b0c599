"""Metrics on disk and output on the terminal."""

import io
import json
import math
import os
import pty
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mtllm_jax.metrics
from mtllm_jax.metrics import Console, MetricsWriter, clock, duration, number, read_metrics


def lines(path: Path) -> list[dict]:
    """The file through a JSON reader that takes no NaN."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_are_there_at_once(tmp_path):
    path = tmp_path / "stage" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss": 0.5, "fvu": 1})
        assert len(lines(path)) == 1
        writer.write(2, {"loss": 0.25})
    first, second = lines(path)
    assert first.keys() == {"step", "time", "loss", "fvu"}
    assert (first["step"], first["loss"], first["fvu"]) == (1, 0.5, 1.0)
    assert first["time"] <= second["time"]


@given(st.lists(st.floats(), min_size=1, max_size=5), st.integers(0, 6))
def test_what_is_written_is_read(tmp_path_factory, losses, last):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write(step, {"loss": loss})
        assert [line["loss"] for line in lines(path)] == [
            loss if math.isfinite(loss) else None for loss in losses
        ]
        writer.truncate_after(last)
        writer.write(last + 1, {"loss": 1.0})
    frame = read_metrics(path)
    assert list(frame["step"]) == [*range(1, min(last, len(losses)) + 1), last + 1]
    for read, loss in zip(frame["loss"], [*losses[:last], 1.0], strict=True):
        assert read == loss if math.isfinite(loss) else math.isnan(read)


def test_a_line_cut_by_a_kill_goes_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.0, "loss": 2.0}\n{"step": 2, "ti')
    assert list(read_metrics(path)["step"]) == [1]
    with MetricsWriter(path) as writer:
        writer.write(2, {"loss": 1.0})
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_columns_of_some_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss": 2.0})
        assert list(read_metrics(path).columns) == ["step", "time", "loss"]
        writer.write(2, {"fvu": 0.5})
    frame = read_metrics(path)
    assert math.isnan(frame["fvu"][0])
    assert frame["fvu"][1] == 0.5
    assert frame["step"].dtype == int


def test_no_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.truncate_after(0)
    assert read_metrics(path).empty
    assert list(read_metrics(path).columns) == ["step", "time"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"time": 1}', '{"step": "one"}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "time": 1.0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is .* must be a JSON object"):
        read_metrics(path)


def test_names_every_line_has(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        with pytest.raises(ValueError, match="'step'"):
            writer.write(1, {"step": 1.0})
    assert not lines(tmp_path / "metrics.jsonl")


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is told: now[0] is in seconds."""
    now = [1000.0]
    monkeypatch.setattr(mtllm_jax.metrics.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines(now):
    """In a log: the first and the last, and between them one every ten seconds."""
    file = io.StringIO()
    console = Console(file)
    with console.stage("stage 1"):
        progress = console.progress(700, "stage 1 general adaptation")
        now[0] += 30  # compilation, which is not the loop's pace
        for step in range(1, 701):
            progress.update(step, loss=700 - step, fvu=0.41)
            now[0] += 1 / 16
    assert file.getvalue().splitlines() == [
        "▶ stage 1",
        "stage 1 general adaptation  1/700 steps  loss 699 fvu 0.41",
        "stage 1 general adaptation  161/700 steps  16 steps/s  eta 0:34  loss 539 fvu 0.41",
        "stage 1 general adaptation  321/700 steps  16 steps/s  eta 0:24  loss 379 fvu 0.41",
        "stage 1 general adaptation  481/700 steps  16 steps/s  eta 0:14  loss 219 fvu 0.41",
        "stage 1 general adaptation  641/700 steps  16 steps/s  eta 0:04  loss 59 fvu 0.41",
        "stage 1 general adaptation  700/700 steps  16 steps/s  1:14  loss 0 fvu 0.41",
        "✓ stage 1  73.8 s",
    ]


def test_resumed_steps_are_not_pace(now):
    file = io.StringIO()
    with Console(file).progress(100, "mini Llama", done=50) as progress:
        now[0] += 10
        progress.update(60)
        now[0] += 10
        progress.update(70)
    assert file.getvalue().splitlines() == [
        "mini Llama  60/100 steps",
        "mini Llama  70/100 steps  1 steps/s  eta 0:30",
    ]


def test_a_stage_that_is_stopped_leaves_its_last_state(now):
    file = io.StringIO()
    console = Console(file)

    def train() -> None:
        with console.stage("stage 2a"):
            progress = console.progress(100, "teacher")
            progress.update(1)
            now[0] += 5
            progress.update(6)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert file.getvalue().splitlines()[-2:] == [
        "teacher  6/100 steps  1 steps/s  0:05",
        "✗ stage 2a  stopped after 5.0 s",
    ]


def test_a_stage_knows_its_seconds(now):
    with Console(io.StringIO()).stage("text") as stage:
        now[0] += 2
        assert stage.seconds == 2
        now[0] += 1
    now[0] += 100
    assert stage.seconds == 3


def test_text_is_no_markup_and_never_wrapped():
    file = io.StringIO()
    console = Console(file)
    console.print("[bold]deu_Latn[/bold] :smile: " + "x" * 200)
    console.warn("row [3] is empty")
    console.table(["language", "[red]accuracy"], [["[deu_Latn]", 0.5]], title="[b]title")
    first, second, *table = file.getvalue().splitlines()
    assert first == "[bold]deu_Latn[/bold] :smile: " + "x" * 200
    assert second == "warning: row [3] is empty"
    assert [line.split() for line in table if "[" in line] == [
        ["[b]title"],
        ["language", "[red]accuracy"],
        ["[deu_Latn]", "0.5"],
    ]


def test_a_terminal_without_unicode():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with Console(file).stage("evaluation"):
        pass
    file.flush()
    assert raw.getvalue().startswith(b"? evaluation\n? evaluation  0.")


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    theirs, ours = pty.openpty()
    with os.fdopen(ours, "w", encoding="utf-8") as terminal:
        console = Console(terminal)
        with console.progress(200, "stage 1") as progress:
            progress.update(50, loss=0.5)
            console.print("between")
        written = ""
        while "\x1b[?25h" not in written:  # the cursor is back
            written += os.read(theirs, 4096).decode(errors="replace")
    os.close(theirs)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
    assert "between" in shown
    assert re.search(r"stage 1  ━+.*  50/200 steps  .*loss 0\.5", shown)


def test_figures():
    assert [number(x) for x in (0.3123, 17.06, 1240.4, 5e-05, 0, 2e7)] == [
        "0.312", "17.1", "1240", "5e-05", "0", "2e+07",
    ]  # fmt: skip
    assert [clock(x) for x in (29.4, 725, 3753)] == ["0:29", "12:05", "1:02:33"]
    assert [duration(x) for x in (12.34, 192, 3725)] == ["12.3 s", "3 min 12 s", "1 h 02 min"]
