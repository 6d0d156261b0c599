"""A run that begins with another's stage 1, and trains the task with several seeds."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
import reduced
from etils import epath

from configs.mtllm import mini
from mtllm_jax import cli, config
from mtllm_jax.config import SYSTEMS
from mtllm_jax.recipes import finished
from mtllm_jax.recipes.finished import FinishedRun, begun
from mtllm_jax.recipes.mtllm import idle_fields

# The mini NLLB translates into English alone.
COMPARED = set(SYSTEMS) - {"translate_train"}


def accuracy(path, test):
    frame = pd.read_json(path, lines=True)
    frame = frame[(frame["test"] == test) & (frame["language"] != "eng_Latn")]
    return (frame["label"] == frame["prediction"]).groupby(frame["language"]).mean().mean()


def test_adapters_are_named_as_the_run_of_stage_1_was_given_them(monkeypatch, tmp_path):
    def of(folder, adapters, **fields):
        given = dataclasses.replace(mini(), **fields)
        read = dataclasses.replace(mini(), llm_adapters=adapters)
        return FinishedRun(epath.Path(folder), given, read, "t", ("a", "b"), 0)

    adapters = ("/cache/x/snapshots/1", f"{tmp_path}/first/mntp/adapter")
    first = of(tmp_path / "first", adapters, llm="some/llm", llm_adapters=("some/adapter",))
    assert first.adapters == ["some/adapter", "mntp/adapter"]
    monkeypatch.setattr(finished, "open_run", lambda folder, stage: first)
    second = of(tmp_path / "second", adapters, stage1=f"{tmp_path}/first")
    assert second.adapters == ["some/adapter", "../first/mntp/adapter"]
    assert second.first.llm == "some/llm"


@pytest.mark.slow
def test_one_stage_1_and_two_seeds_of_the_task(mini_run, tmp_path):
    """The first seed is the other run's: the same answers, byte for byte."""
    flags = reduced.flags({"stage1": mini_run, "seeds": "0,5"})
    done = reduced.train(*reduced.ARGUMENTS, *flags, "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = tmp_path / "run"
    trained = {path.parent.relative_to(run).as_posix() for path in run.rglob("done.json")}
    again = {"teacher", "distillation", "mt_encoder"}
    assert trained == again | {f"seed-5/{name}" for name in again} | {"text", "evaluation"}
    results = json.loads((run / "results.json").read_text())
    assert results["seeds"] == [0, 5]
    assert set(results["systems"]) == COMPARED
    for system in COMPARED:
        first, second = (run / "predictions" / f"{at}{system}.jsonl" for at in ("", "seed-5/"))
        assert first.read_bytes() == (mini_run / "predictions" / f"{system}.jsonl").read_bytes()
        for key, test in (("systems", "seen"), ("systems_unseen", "unseen")):
            a, b = accuracy(first, test), accuracy(second, test)
            entry = results[key][system]
            assert entry["mean"] == pytest.approx((a + b) / 2)
            assert entry["std"] == pytest.approx(abs(a - b) / 2**0.5)
    assert (run / "predictions" / "seed-5" / "mt_llm.jsonl").read_bytes() != (
        run / "predictions" / "mt_llm.jsonl"
    ).read_bytes()
    assert "± over seeds" in done.stdout


def given(run, **changes):
    values = json.loads((run / "config.json").read_text())
    return cli.resolve(config.MTLLM, values | {"stage1": str(run)} | changes)


def test_what_a_stage_1_brings_is_not_given_again(mini_run):
    found = begun(given(mini_run))
    assert found.encoder == str(mini_run / "mini_nllb" / "model")
    assert found.llm == str(mini_run / "mini_llama" / "model")
    assert begun(found.__class__(**{**vars(given(mini_run)), "stage1": ""})).encoder == ""
    with pytest.raises(
        ValueError, match=r"config\.llm is 'x'; it must be empty: config\.stage1 br"
    ):
        begun(given(mini_run, llm="x"))
    lora = {"rank": 3, "alpha": 32.0, "dropout": 0.0, "targets": ["all"], "start": ""}
    with pytest.raises(ValueError, match=r"settings \(lora\.rank 16 → 3\); they must be the same"):
        begun(given(mini_run, lora=lora))
    told = idle_fields(given(mini_run), ["adaptation.training.steps", "mini_llama.width"])
    assert told == (
        "without effect here: config.adaptation.training.steps (config.stage1 brings its stage 1);"
        " config.mini_llama.width (config.stage1 names the model)."
    )


def test_what_holds_no_stage_1(mini_run, tmp_path):
    with pytest.raises(ValueError, match=r"config\.stage1: .* is not a folder"):
        begun(given(mini_run, stage1=str(tmp_path / "none")))
    unfinished = tmp_path / "run"
    shutil.copytree(mini_run, unfinished)
    (unfinished / "adaptation" / "done.json").unlink()
    with pytest.raises(ValueError, match="a run that has not finished its stage 1; go on with it"):
        begun(given(unfinished))
    values = json.loads((unfinished / "config.json").read_text()) | {"stage1": str(mini_run)}
    (unfinished / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"has begun with the stage 1 of {mini_run}; name that"):
        begun(given(unfinished))
