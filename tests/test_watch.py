"""Goodput, TensorBoard, the profiler's steps, and where compiled programs are kept."""

import collections
import json
import struct

import numpy as np
import pytest
import reduced
from etils import epath
from tensorboardX.proto import event_pb2

from mtllm_jax import watch
from mtllm_jax.chips import CHIPS, chip_of
from mtllm_jax.goodput import KINDS, Goodput, of_run, percentiles, told
from mtllm_jax.metrics import read_metrics


def test_seconds_add_up_by_kind_and_over_starts(tmp_path):
    now = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0, 10.5])
    path = epath.Path(tmp_path / "goodput.json")
    one = Goodput(path, now=lambda: next(now))  # at 0
    one.to("input")  # 1: setup took 1
    one.to("steps")  # 3: input took 2
    one.to("input")  # 4: steps took 1
    one.count_as("steps")
    one.to("save")  # 9: 5 that were steps after all
    one.write()  # 10: save took 1
    assert one.seconds == dict.fromkeys(KINDS, 0.0) | {
        "setup": 1.0, "input": 2.0, "steps": 6.0, "save": 1.0
    }  # fmt: skip
    assert json.loads(path.read_text())["goodput"] == one.share == 0.6
    later = iter([100.0, 110.0])
    two = Goodput(path, now=lambda: next(later))
    two.write()
    assert two.seconds["setup"] == 11.0 and two.seconds["steps"] == 6.0
    assert json.loads(path.read_text())["goodput"] == 0.3


def test_where_the_time_of_a_run_went():
    """All seconds of all stages, each of one kind; what a killed start trained counts too."""
    trained = {
        "teacher": {"setup": 1.0, "compile": 2.0, "input": 0.5, "steps": 6.0, "goodput": 0.6},
        "adaptation": {"restore": 1.0, "steps": 30.0, "goodput": 0.9},
    }
    seconds = {"text": 3.0, "adaptation": 20.0, "teacher": 10.0, "evaluation": 7.0}
    time = of_run(seconds, trained)
    sums = {"setup": 4.5, "compile": 2.0, "input": 0.5, "restore": 1.0, "steps": 36.0}
    sums |= {"packing": 0.0, "save": 0.0, "evaluation": 7.0}
    assert time == sums | {"goodput": round(36 / 51, 4)}
    assert told(time) == (
        "steps 70.6%, evaluation 13.7%, setup 8.8%, compile 3.9%, restore 2.0%, input 1.0%"
    )


def test_percentiles_of_step_times():
    assert percentiles([]) == {}
    assert percentiles([0.1 * i for i in range(101)]) == {"p50": 5.0, "p90": 9.0, "p99": 9.9}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
     ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
     ("NVIDIA H100 PCIe", None), ("cpu", None)],
)  # fmt: skip
def test_chips_by_what_jax_calls_them(kind, name):
    assert chip_of(kind) == (CHIPS[name] if name else None)


@pytest.mark.parametrize("text", ["adaptation", "adaptation:0-3", "adaptation:7-3", "3-7", "a:b-c"])
def test_a_profile_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=rf"--profile is '{text}'; it must be a stage and its"):
        watch.parse_profile(text)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--wandb needs wandb: pip install -e"):
        watch.Watch(wandb="project").check({})
    watch.UNWATCHED.check({})


@pytest.mark.parametrize("profile", [("teachers", 1, 2), ("teacher", 19, 21)])
def test_a_profile_of_what_is_not_trained_is_refused(profile):
    with pytest.raises(ValueError, match=r"--profile is teacher.*: teacher \(20 steps\)\."):
        watch.Watch(profile=profile).check({"teacher": 20})


def scalars(folder):
    """{name: values in turn} of TensorBoard's event files, which are TFRecords."""
    found = collections.defaultdict(list)
    for path in folder.iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
            place += 16 + length
    return found


@pytest.mark.slow
def test_a_run_that_is_watched(tmp_path, monkeypatch):
    """Metrics are the same in metrics.jsonl and TensorBoard; the steps asked for are profiled; a
    start that finds its programs compiled adds none."""
    # However fast a program was compiled, it is kept.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    arguments = [*reduced.ARGUMENTS, f"--compile_cache={tmp_path / 'compiled'}"]
    watched = ["--tensorboard", "--profile=adaptation:5-7"]
    done = reduced.train(*arguments, *watched, "--workdir=one", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    stage = tmp_path / "one" / "adaptation"
    frame = read_metrics(stage / "metrics.jsonl")
    events = scalars(stage / "tensorboard")
    for name in ("loss", "lr", "grad_norm", "source_fill"):
        steps, values = zip(*events[name], strict=True)
        assert list(steps) == list(frame["step"])
        np.testing.assert_allclose(values, frame[name], rtol=1e-6)
    assert frame["seconds"].isna().sum() == 1  # of the step that compiles
    assert list((stage / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "one" / "teacher" / "profile").exists()
    assert not (tmp_path / "one" / "compiled").exists()

    programs = {path.name for path in (tmp_path / "compiled").glob("*-cache")}
    assert programs
    done = reduced.train(*arguments, "--workdir=two", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "compiled").glob("*-cache")} == programs
    np.testing.assert_array_equal(
        read_metrics(tmp_path / "two" / "adaptation" / "metrics.jsonl")["loss"], frame["loss"]
    )
