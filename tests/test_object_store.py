"""Folders at gs://, in a bucket on loopback: what is written there, and read again."""

import importlib.util

import jax
import numpy as np
import pytest
import saved
from etils import epath

from mtllm_jax import report, runfolder
from mtllm_jax.metrics import MetricsWriter, read_metrics
from mtllm_jax.runfolder import (
    RunFolder,
    finished_results,
    made_locally,
    new_file,
    run_path,
    write_text,
)
from mtllm_jax.watch import Watch

RUN = epath.Path("gs://bucket/run")
VALUES = {"recipe": "mtllm", "seed": 1}


def test_a_run_folder(bucket):
    assert finished_results(RUN, VALUES) is None
    run = RunFolder(RUN, VALUES)
    run.write_jsonl("predictions/one.jsonl", [{"id": 1}, {"id": 2}])
    run.write_json("results.json", {"systems": {"one": 1}})
    assert finished_results(RUN, VALUES) is None  # no report yet
    run.write_text("report.html", "<p>")
    assert finished_results(RUN, VALUES) == {"systems": {"one": 1}}
    assert bucket.read("run/predictions/one.jsonl") == b'{"id": 1}\n{"id": 2}\n'
    with pytest.raises(ValueError, match="holds a run of another config"):
        RunFolder(RUN, VALUES | {"seed": 2})
    stage = run.stage("teacher")
    stage.notes["rows"] = 3
    stage.finish({"seconds": 1.0})
    assert run.stage("teacher").is_done() and stage.info() == {"seconds": 1.0, "rows": 3}


def test_buckets_that_runs_cannot_be_in(bucket, monkeypatch):
    with pytest.raises(ValueError, match=r"^workdir gs://other/run cannot be used: there is no su"):
        RunFolder("gs://other/run", VALUES)
    for folder in ("gs://", "s3://bucket/run"):
        with pytest.raises(ValueError, match=rf"^workdir {folder} must be a local folder or gs://"):
            run_path(folder)
    forbidden = OSError("Forbidden: https://storage.googleapis.com/…\nno storage.objects.create")
    monkeypatch.setattr(RunFolder, "write_json", lambda *_: raised(forbidden))
    with pytest.raises(ValueError, match=r"^workdir gs://bucket/run cannot be used: access is den"):
        RunFolder(RUN, VALUES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^workdir gs://bucket/run needs gcsfs: pip install -e"):
        run_path(RUN)


def raised(error):
    raise error


def test_what_others_write_is_seen(bucket):
    """gcsfs would go by what it has listed before."""
    write_text(RUN / "one", "1")
    assert [path.name for path in RUN.iterdir()] == ["one"]
    bucket.put("run/two", b"2")
    assert [path.name for path in RUN.iterdir()] == ["one", "two"] and (RUN / "two").exists()


def test_a_file_appears_whole_or_not_at_all(bucket):
    array = np.arange(6.0).reshape(2, 3)
    with new_file(RUN / "a.npy") as file:
        assert bucket.names() == []
        np.save(file, array)
    with (RUN / "a.npy").open("rb") as file:
        np.testing.assert_array_equal(np.load(file), array)
    before = bucket.read("run/a.npy")

    def stopped():
        with new_file(RUN / "a.npy") as file:
            np.save(file, array + 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert bucket.names() == ["run/a.npy"] and bucket.read("run/a.npy") == before


def test_a_folder_is_copied_with_its_mark_last(bucket):
    with made_locally(RUN / "model", "config.json") as new:
        (new / "more").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "more/z"):
            (new / name).write_bytes(name.encode() * 3)
    assert bucket.written == [
        f"run/model/{name}" for name in ("model.safetensors", "more/z", "config.json")
    ]
    for name in bucket.written:
        assert bucket.read(name) == name.removeprefix("run/model/").encode() * 3


def test_metrics_go_on_where_the_last_start_left_them(bucket):
    path = RUN / "adaptation" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.truncate_after(0)
        writer.write(1, {"loss": 3.0})
        assert not path.exists()  # an object cannot be appended to
        writer.sync()
        assert list(read_metrics(path)["step"]) == [1]
        writer.write(2, {"loss": 2.0})
        writer.write(3, {"loss": 1.0})
    assert list(read_metrics(path)["step"]) == [1, 2, 3]
    with MetricsWriter(path) as writer:
        writer.truncate_after(2)
        writer.write(3, {"loss": 1.5})
    frame = read_metrics(path)
    assert list(frame["step"]) == [1, 2, 3] and list(frame["loss"]) == [3.0, 2.0, 1.5]


@pytest.mark.parametrize(("took", "writes"), [(0.1, 3), (5.0, 1)])
def test_metrics_are_written_anew_seldom(bucket, monkeypatch, took, writes):
    """A step a second for four minutes: once a minute, or a hundredth of the time."""
    now, sent = 0.0, []
    monkeypatch.setattr(runfolder.time, "monotonic", lambda: now)

    def upload(file, to):
        nonlocal now
        sent.append(now)
        now += took

    monkeypatch.setattr(runfolder, "upload", upload)
    writer = MetricsWriter(RUN / "metrics.jsonl")
    for step in range(240):
        now += 1
        writer.write(step, {"loss": 1.0})
    assert len(sent) == writes and sent[0] == 61
    writer.close()
    assert len(sent) == writes + 1


def test_a_damaged_checkpoint_falls_back_to_the_one_before(bucket):
    saved.save_steps(RUN / "checkpoints", 1, 2, 3)
    steps = {name.partition("/")[0] for name in bucket.names("run/checkpoints/")}
    assert steps == {"2", "3", "newest"}
    bucket.flip_a_byte("run/checkpoints/3/state/d/")
    (state, step), said = saved.restore(RUN / "checkpoints")
    assert step == 2 and len(said) == 1 and "the checkpoint of step 3 is damaged" in said[0]
    saved.assert_same(state, saved.make_state(2))


def test_what_watches_a_stage_writes_there(bucket):
    watch = Watch(tensorboard=True, profile=("adaptation", 2, 3))
    (board,) = watch.sinks(RUN / "adaptation", 0)
    board.write(1, {"loss": 3.0})
    board.close()
    profiler = watch.profiler(RUN / "adaptation")
    for step in range(1, 5):
        profiler.before(step)
        profiler.after(step, jax.numpy.ones(3) + step)
    kinds = [name.split("/")[0] for name in bucket.names("run/adaptation/")]
    assert set(kinds) == {"profile", "tensorboard"}
    assert any(name.endswith(".xplane.pb") for name in bucket.names())


def test_a_report(bucket, monkeypatch):
    monkeypatch.setattr(report, "_context", lambda *_: {})
    monkeypatch.setattr(report.jinja2.Template, "render", lambda self, context: "a page")
    assert report.write_report(RUN, {}, {}, {}, {}).read_text() == "a page"
