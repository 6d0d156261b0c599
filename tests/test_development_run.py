"""Runs whose stages look at English development rows and end by a rule."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import reduced

from mtllm_jax import sharding
from mtllm_jax.cli import load_config
from mtllm_jax.config import MTLLM
from mtllm_jax.data.texts import texts_of
from mtllm_jax.metrics import Console, read_metrics
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.inputs import idle_fields, read_inputs
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.schema import resolve, to_dict

TASK = ("teacher", "distillation.training", "mt_encoder")


def config(fields):
    values = load_config(f"{reduced.ROOT}/configs/mtllm.py")
    for path, value in fields.items():
        *groups, last = path.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[last] = value
    return resolve(MTLLM, values)


def refusal(fields):
    with pytest.raises(ValueError, match=r"[^.]\.$") as raised:
        read_inputs(config(fields))
    return str(raised.value)


def test_development_data_is_asked_for_and_found_at_the_door(tmp_path, mini_run):
    own = reduced.own_fields(tmp_path, mini_run)
    looking = own | {"teacher.evaluate_every": 5}
    assert not read_inputs(config(own)).task.dev
    assert refusal(looking) == (
        "config.task.dev is ''; it must be a file of labelled English rows where a stage of the"
        " task has evaluate_every above 0."
    )
    (tmp_path / "dev.tsv").write_text("text\tlabel\nMali\tAfrica\nPeru\tAmerica\n")
    named = looking | {"task.dev": str(tmp_path / "dev.tsv")}
    assert [row["text"] for row in read_inputs(config(named)).task.dev] == ["Mali", "Peru"]
    (tmp_path / "dev.tsv").write_text("text\tlabel\nMali\tAfrika\n")
    assert "dev.tsv, line 2: the label is 'Afrika'" in refusal(named)
    assert "task.dev (no stage of the task has evaluate_every" in idle_fields(
        config(own | {"task.dev": "x"}), ["task.dev"]
    )
    assert "evaluation.split is 'dev'; it must be 'test'" in refusal(
        {"teacher.evaluate_every": 5, "evaluation.split": "dev"}
    )
    assert "mini_llama.training.evaluate_every is 5; it must be 0" in refusal(
        {"mini_llama.training.evaluate_every": 5}
    )
    few = own | {"adaptation.training.evaluate_every": 5, "adaptation.dev_texts": 21}
    assert "dev_texts is 21; it must be at most half of the 40 English texts" in refusal(few)


def test_a_benchmark_brings_its_english_development_rows(mtllm_data, mini_run):
    fields = {
        "encoder": str(mini_run / "mini_nllb" / "model"),
        "task.benchmark": "sib200",
        "task.data": str(mtllm_data / "sib200"),
        "task.languages": ("deu_Latn",),
        "mt_encoder.evaluate_every": 5,
    }
    dev = read_inputs(config(fields)).task.dev
    assert len(dev) == 99 and {row["language"] for row in dev} == {"eng_Latn"}


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_stage_1_is_evaluated_on_texts_that_it_does_not_train_on(tmp_path, mini_run, packing):
    """On two devices, the error is that of the vectors as they are made one by one."""
    own = reduced.own_fields(tmp_path, mini_run)
    settings = config(own | {"adaptation.dev_texts": 5, "adaptation.samplings": 2})
    training = dataclasses.replace(
        settings.adaptation.training, steps=4, evaluate_every=2, packing=packing, chosen="best"
    )
    settings = dataclasses.replace(
        settings, adaptation=dataclasses.replace(settings.adaptation, training=training)
    )
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:2])
    run = RunFolder(tmp_path / "run", to_dict(settings))
    job = Job(settings, run, Console(io.StringIO()), mesh, 0)
    parts = stacking.load_parts(settings, own["encoder"], own["llm"], mesh)
    texts = [f"Kenya, Togo and {i}" for i in range(20)]
    adapted = stacking.general_adaptation(job, parts, texts_of(texts))
    assert job.stages["adaptation"]["packing"]["texts"] == 30  # of 15, in two ways each
    chosen = job.stages["adaptation"]["chosen"]
    frame = read_metrics(tmp_path / "run" / "adaptation" / "metrics.jsonl")
    assert chosen["best_dev_loss"] == pytest.approx(frame["dev_loss"].min(), rel=1e-6)
    assert frame["dev_loss"].notna().tolist() == [False, True, False, True]

    stack = stacking.with_trained(settings, stacking.build_stack(settings, parts, 0), adapted)
    held = [{"text": text, "language": "eng_Latn"} for text in texts[3::4]]
    length = settings.evaluation.max_length
    made = runner(job, stacking.stack_forward(stack, causal=False, dtype="float32"), parts.source)(
        *stacking.source_tokens(parts.source, held, length)
    )
    teacher = stacking.LLMClassifier(parts.llm, None)
    wanted = runner(job, stacking.llm_forward(settings, teacher), parts.target)(
        *stacking.target_tokens(parts.target, held, length)
    )
    error = np.mean(np.square(made - wanted))
    np.testing.assert_allclose(error, chosen["best_dev_loss"], rtol=1e-4)  # float32, two orders


def runner(job, forward, tokenizer):
    return stacking.Vectors(*forward, pad_id=tokenizer.pad_id, batch_rows=8, mesh=job.mesh)


@pytest.mark.slow
def test_the_stages_of_a_task_end_by_their_rules(tmp_path, mini_run):
    fields = {f"{stage}.evaluate_every": 4 for stage in TASK} | {
        "stage1": mini_run,
        "text.dev_pairs": 6,
        "teacher.chosen": "best",
        "distillation.training.chosen": "best",
        "distillation.training.learning_rate": 0.5,  # far too high: what is good is soon lost
        "distillation.training.patience": 2,
        "mt_encoder.chosen": "average",
        "mt_encoder.averaged": 2,
    }
    done = reduced.train(*reduced.ARGUMENTS, *reduced.flags(fields), "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = {
        stage: json.loads((tmp_path / "run" / stage / "done.json").read_text())["chosen"]
        for stage in ("teacher", "distillation", "mt_encoder")
    }
    frames = {
        stage: read_metrics(tmp_path / "run" / stage / "metrics.jsonl").set_index("step")
        for stage in told
    }
    assert told["mt_encoder"] == {
        "rule": "average",
        "checkpoints": 2,
        **best(frames["mt_encoder"], by_accuracy=True),
    }
    assert told["teacher"] == {"rule": "best", **best(frames["teacher"], by_accuracy=True)}
    found = best(frames["distillation"], by_accuracy=False)
    assert told["distillation"] == {"rule": "best", **found}
    last = frames["distillation"].index[-1]
    assert last == min(found["best_step"] + 2 * 4, reduced.STEPS)
    assert "development loss" in (tmp_path / "run" / "report.html").read_text()


def best(frame, *, by_accuracy):
    """What the notes of a stage are to say, from its metrics."""
    frame = frame[frame["dev_loss"].notna()]
    order = ["dev_accuracy", "dev_loss"] if by_accuracy else ["dev_loss"]
    first = frame.sort_values(order, ascending=[False, True][-len(order) :], kind="stable").iloc[0]
    about = {"best_step": int(first.name), "best_dev_loss": pytest.approx(first["dev_loss"])}
    accuracy = first["dev_accuracy"] if by_accuracy else 0
    return about | ({"best_dev_accuracy": pytest.approx(accuracy)} if accuracy else {})
