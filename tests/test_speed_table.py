"""benchmarks/run.py on timings that are made up: what becomes of them, and how sides are asked."""

import json
import sys
from pathlib import Path

import pytest
import run

FAKE_SIDE = f"""
import sys
sys.path.insert(0, {str(Path(run.__file__).parent)!r})
from sides import Work, serve


class Fake(Work):
    def __init__(self, options):
        print("words of a library")

    def facts(self):
        return {{"loss": 0.5}}

    def measure(self):
        return {{"seconds": 2.0, "useful": 10}}

    def load(self):
        return 4


serve({{"embed": Fake}})
"""

# Seconds of the rounds of each side, by row; others take 1. Each round reads 100 tokens.
SECONDS = {
    ("ours", "train_grouped"): [1.0, 2.0, 4.0, 2.0, 2.0],
    ("peer", "train_grouped"): [3.0, 2.0, 8.0, 4.0, 4.0],
    ("ours", "input"): [0.02, 0.01, 0.01, 0.01, 0.01],
}


class FakeSide:
    def __init__(self, side, row, options):
        self.facts = {"loss": 0.5, "tokens": [[1, 2]], "read": 7}
        self.first, self.ready, self.key = 1.0, 2.0, (side, row)
        self.seconds = iter(SECONDS.get(self.key, [1.0] * 5))

    def round(self):
        return {"seconds": next(self.seconds), "useful": 100, "steps": 2}

    def end(self):
        return 3.0 if self.key == ("ours", "train_grouped") else 1.5


def said_once(side, row, options, only, **environment):
    if row == "plan":
        compiled = {"all-gather": 100.0, "all-reduce": 10.0}
        return {
            "facts": {"planned": {"all-gather": 96.0, "all-reduce": 14.0}, "compiled": compiled}
        }
    return {"peak": 3e9 if side == "ours" else 5e9, "arrays": 1e9}


@pytest.fixture
def pages(monkeypatch):
    """What is left beside the benchmarks, by name."""
    found = {}
    monkeypatch.setattr(run, "Side", FakeSide)
    monkeypatch.setattr(run, "said_once", said_once)
    monkeypatch.setattr(run, "missing", lambda row, options: "" if row != "sample" else "an LLM")
    monkeypatch.setattr(run, "page", lambda title, command, packages, body: body)
    monkeypatch.setattr(run, "write", found.__setitem__)
    return found


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    run.main()


def test_the_whole_table(monkeypatch, tmp_path, pages, capsys):
    file = tmp_path / "speed.json"
    call(monkeypatch, "--shape=cpu", f"--json={file}")
    ratios = json.loads(file.read_text())["ratios"]
    assert list(ratios) == [row for row in run.CPU_BARS if row != "sample"]
    assert "sample is left out: an LLM is not there." in capsys.readouterr().out
    # Rounds: 3 ÷ 1, 2 ÷ 2, 8 ÷ 4, twice 4 ÷ 2.
    assert ratios["train_grouped"] == {"ratio": 2.0, "bar": 1.1, "spread": [1.0, 3.0]}
    assert ratios["train_memory"]["ratio"] == 0.5
    assert ratios["load_memory"]["ratio"] == (5 - 1) / (3 - 1)
    # The step's median is 50 tokens/s, so that 1000 are asked for.
    assert ratios["input"]["ratio"] == 10_000 / 1000
    assert ratios["plan"]["ratio"] == 0.96  # gathers; all kinds together are equal
    lines = pages["speed-cpu"].splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(ratios)
    assert lines[-1] == "sample is left out: an LLM is not there."
    assert "| train_memory | 0.50 | 0.50–0.50 | 1.0 | missed | GB 3 | GB 1.5 |" in lines


def test_rows_that_are_there_are_kept(monkeypatch, tmp_path, pages):
    file = tmp_path / "speed.json"
    call(monkeypatch, "--only=train_memory", f"--json={file}")
    assert set(json.loads(file.read_text())["ratios"]) == {"train_grouped", "train_memory"}
    assert not pages
    kept = file.read_text()
    monkeypatch.setitem(SECONDS, ("ours", "train_grouped"), [1.0] * 5)
    call(monkeypatch, "--only=train_memory", f"--json={file}")
    assert file.read_text() == kept
    call(monkeypatch, "--only=train_grouped", f"--json={file}")
    assert json.loads(file.read_text())["ratios"]["train_grouped"]["ratio"] == 4.0


def test_sides_that_do_different_work_are_refused():
    run.check_alike("embed", {"loss": 1.0}, {"loss": 1.0009})
    for ours, peer in (
        ({"loss": 1.0}, {"loss": 1.002}),
        ({"loss": float("nan")}, {"loss": float("nan")}),
        ({"tokens": [[1, 2], [3, 4]]}, {"tokens": [[1, 2], [3, 5]]}),
        ({"read": 3}, {"read": 4}),
    ):
        with pytest.raises(RuntimeError, match="embed"):
            run.check_alike("embed", ours, peer)


def test_what_a_side_says(monkeypatch, tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_SIDE)
    monkeypatch.setitem(run.SIDES, "ours", str(script))
    with open(tmp_path / "log", "w") as log:
        options = run.Options("cpu", tmp_path, tmp_path, tmp_path, 3, log, [sys.executable], False)
        side = run.Side("ours", "embed", options)
        assert side.facts == {"loss": 0.5}
        assert side.round() == side.round() == {"seconds": 2.0, "useful": 10}
        assert 0.001 < side.end() < 1  # GB
        assert run.said_once("ours", "embed", options, "load")["arrays"] == 4
    assert "words of a library" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("flags", [["--only=fast"], ["--rounds=2"], ["--only=control"]])
def test_mistakes_end_at_the_door(monkeypatch, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *flags)
    assert "it must be" in capsys.readouterr().err
