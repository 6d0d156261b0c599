"""The run folder: whose it is, what survives, and that nothing is touched when it is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtllm_jax import runfolder
from mtllm_jax.runfolder import RunFolder, differing_fields, finished_results

ROOT = Path(__file__).parents[1]
CONFIG = {"seed": 0, "model": {"width": 8, "layers": 2}, "languages": ["deu_Latn"]}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def make_run(path: Path) -> None:
    folder = RunFolder(path, CONFIG)
    folder.stage("stage1").finish({"seconds": 1.5})
    folder.write_jsonl("predictions/mt_llm.jsonl", [{"text": "日本", "label": "Asia"}])
    folder.close()


def test_a_run_is_made_found_again_and_keeps_what_was_written(tmp_path):
    make_run(tmp_path / "a" / "run")
    folder = RunFolder(str(tmp_path / "a" / "run"), CONFIG)
    assert folder.read_json("config.json") == CONFIG
    stage = folder.stage("stage1")
    assert stage.is_done() and stage.info() == {"seconds": 1.5}
    assert stage.metrics.parent == stage.path == stage.checkpoints.parent
    rows = (tmp_path / "a/run/predictions/mt_llm.jsonl").read_text(encoding="utf-8")
    assert rows == '{"text": "日本", "label": "Asia"}\n'
    assert not folder.stage("stage2").is_done()


def test_finished_means_results_and_report(tmp_path):
    assert finished_results(tmp_path / "run", CONFIG) is None and not any(tmp_path.iterdir())
    folder = RunFolder(tmp_path, CONFIG)
    results = {"systems": {"mt_llm": {"mean": 0.9}}}
    assert finished_results(tmp_path, CONFIG) is None
    folder.write_json("results.json", results)
    assert finished_results(tmp_path, CONFIG) is None
    folder.write_text("report.html", "<p>")
    assert finished_results(tmp_path, CONFIG) == results
    with pytest.raises(ValueError, match="seed 0 → 1"):
        finished_results(tmp_path, CONFIG | {"seed": 1})
    folder.write_json("results.json", {"systems": {}})
    assert finished_results(tmp_path, CONFIG) is None


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    make_run(tmp_path)
    before = snapshot(tmp_path)
    other = {**CONFIG, "seed": 1, "model": {"width": 16, "depth": 2}}
    with pytest.raises(ValueError, match=r"^workdir|/config.json, line ") as raised:
        RunFolder(tmp_path, other)
    message = str(raised.value)
    expected = [
        "seed 0 → 1",
        "model.width 8 → 16",
        "model.layers 2 → (absent)",
        "model.depth (absent) → 2",
        f"--config={tmp_path}/config.json",
    ]
    for words in expected:
        assert words in message
    assert "languages" not in message and "\n" not in message
    assert snapshot(tmp_path) == before


def test_many_differences_are_counted(tmp_path):
    RunFolder(tmp_path, {f"f{i}": 0 for i in range(10)}).close()
    with pytest.raises(ValueError, match=r"f5 0 → 1 and 4 more\)"):
        RunFolder(tmp_path, {f"f{i}": 1 for i in range(10)})


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": {}}, {"a": {"b": 1}}, ["a {} → (absent)", "a.b (absent) → 1"]),
        ({"a": None}, {"a": "x"}, ['a null → "x"']),
        ({"a": [1, 2]}, {"a": [1]}, ["a [1, 2] → [1]"]),
    ],
)
def test_differing_fields(old, new, expected):
    assert differing_fields(old, new) == expected


@pytest.mark.parametrize("kind", ["foreign", "file", "below a file", "broken", "odd", "forbidden"])
def test_a_path_that_is_no_run_is_refused_untouched(tmp_path, kind):
    path = tmp_path / "here"
    if kind == "foreign":
        path.mkdir()
        (path / "thesis.tex").write_text("x")
        words = "'thesis.tex' but no config.json"
    elif kind == "broken":
        path.mkdir()
        (path / "config.json").write_text('{"seed": 0,\n')
        words = "config.json, line"
    elif kind == "odd":
        (path / "config.json").mkdir(parents=True)
        words = "config.json cannot be read: Is a directory"
    elif kind == "forbidden":
        path, words = Path("/proc/here"), "cannot be written to"
    else:
        path.write_text("x")
        words = "is a file"
        if kind == "below a file":
            path, words = path / "run", "cannot be written to: Not a directory"
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"^workdir|/config.json(,| cannot be) ") as raised:
        RunFolder(path, CONFIG)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert snapshot(tmp_path) == before


def test_a_start_that_was_killed_on_its_way_in_can_be_repeated(tmp_path):
    (tmp_path / ".lock").write_text("1")
    (tmp_path / ".config.json.unfinished").write_text("{")
    RunFolder(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert not (tmp_path / ".config.json.unfinished").exists()


def test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, json; from mtllm_jax.runfolder import RunFolder;"
         "f = RunFolder(sys.argv[1], json.loads(sys.argv[2])); print('held', flush=True);"
         "time.sleep(60)", str(tmp_path), json.dumps(CONFIG)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another process \({holder.pid}\)"):
            RunFolder(tmp_path, CONFIG)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunFolder(tmp_path, CONFIG)


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, CONFIG)
    folder.write_json("results.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("results.json", {"new": float("nan")})

    def break_off(descriptor: int) -> None:
        raise OSError("the machine is gone")

    monkeypatch.setattr(runfolder.os, "fsync", break_off)
    with pytest.raises(OSError, match="the machine is gone"):
        folder.write_json("results.json", {"new": 2})
    assert folder.read_json("results.json") == {"old": 1}
