"""A run folder at gs://, kept in memory by fsspec: what is written there, and read again."""

import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from configs.mtllm import mini
from mtllm_jax import report
from mtllm_jax.metrics import MetricsWriter, read_metrics
from mtllm_jax.recipes.mtllm import check_workdir
from mtllm_jax.runfolder import RunFolder, finished_results, is_local, new_file


@pytest.fixture
def folder(monkeypatch):
    """gs://bucket/run."""
    MemoryFileSystem.store.clear()
    backend = epath.backend.fsspec_backend
    monkeypatch.setattr(
        type(backend), "_get_filesystem", lambda self, name: MemoryFileSystem(), raising=True
    )
    yield epath.Path("gs://bucket/run")
    MemoryFileSystem.store.clear()


def test_a_run_folder(folder):
    values = {"recipe": "mtllm", "seed": 1}
    assert finished_results(folder, values) is None
    run = RunFolder(folder, values)
    run.write_jsonl("predictions/one.jsonl", [{"id": 1}, {"id": 2}])
    run.write_json("results.json", {"systems": {"one": 1}})
    assert finished_results(folder, values) is None  # no report yet
    run.write_text("report.html", "<p>")
    assert finished_results(folder, values) == {"systems": {"one": 1}}
    assert (folder / "predictions" / "one.jsonl").read_text() == '{"id": 1}\n{"id": 2}\n'
    with pytest.raises(ValueError, match="holds a run of another config"):
        RunFolder(folder, values | {"seed": 2})
    stage = run.stage("teacher")
    stage.notes["rows"] = 3
    stage.finish({"seconds": 1.0})
    assert run.stage("teacher").is_done() and stage.info() == {"seconds": 1.0, "rows": 3}


def test_metrics_go_on_where_the_last_start_left_them(folder):
    path = folder / "adaptation" / "metrics.jsonl"
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


def test_arrays(folder):
    path, array = folder / "distillation" / "vectors.npy", np.arange(6.0).reshape(2, 3)
    with new_file(path) as file:
        np.save(file, array)
    with path.open("rb") as file:
        np.testing.assert_array_equal(np.load(file), array)


def test_a_report(folder, monkeypatch):
    monkeypatch.setattr(report, "_context", lambda *_: {})
    monkeypatch.setattr(report.jinja2.Template, "render", lambda self, context: "a page")
    assert report.write_report(folder, {}, {}, {}, {}).read_text() == "a page"


def test_what_is_made_in_local_folders_is_refused(tmp_path):
    check_workdir(mini(), tmp_path)
    with pytest.raises(ValueError, match=r"workdir gs://bucket/run is in an object store, and the"):
        check_workdir(mini(), "gs://bucket/run")
    assert is_local(tmp_path) and not is_local("gs://bucket/run")
