"""The stack tuned on a task's labels directly, with a head of its own."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from test_task_run import CHOICES, finished, predictions, write_jsonl

import mtllm_jax
from mtllm_jax.export import export
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.finished import open_run

LABELS = {
    "distillation.learns": "labels",
    "distillation.start": "stage1",
    "evaluation.systems": "mt_llm",
    "teacher.steps": 1,
}


def test_what_is_minimised_is_the_labels_cross_entropy():
    config = tiny.settings(trained="lora")
    model = tiny.randomised(
        stacking.new_student(config, tiny.parts(), None, tiny.CLASSES, seed=0), 3
    )
    graph, trainable, frozen = nnx.split(model, stacking.is_trained(config), ...)
    learns = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}
    assert "head/kernel" in learns and any(path.endswith("lora_a") for path in learns)
    assert not any("encoder" in path for path in learns)
    objective = stacking.tuning_objective(config, graph)
    stage = tiny.Stage(graph, trainable, frozen, objective, tiny.texts("source"), tiny.labels())
    gradient, terms = stage(stage.batch())
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient))

    batch = stage.batch(packing=False)
    pooled_BND = model.stack.pooled(
        batch["source_ids"], batch["source_segments"], tiny.MOST_TEXTS, causal=False
    )
    logits_MC = np.asarray(pooled_BND[:, 0], np.float64) @ np.asarray(model.head.kernel[...])
    labels_M = stage.tables["label"]
    odds_MC = np.exp(logits_MC)
    wanted = -np.log(odds_MC[np.arange(len(labels_M)), labels_M] / odds_MC.sum(1))
    loss, count = terms["loss"]
    assert count == tiny.NUM_TEXTS
    np.testing.assert_allclose(loss / count, wanted.mean(), rtol=1e-5)  # float32


def test_a_start_from_the_teacher_is_refused():
    start = dataclasses.replace(tiny.settings().distillation, start="stage1+teacher")
    with pytest.raises(ValueError, match=r"distillation\.start is 'stage1\+teacher'; it must be"):
        dataclasses.replace(start, learns="labels").check()


@pytest.mark.slow
def test_a_run_on_labels_predicts_and_is_exported_with_its_own_head(mini_run, tmp_path):
    run, results = finished(mini_run, tmp_path, LABELS | {"task.name": ""})
    assert results["stage_2b"] == "labels"
    opened = open_run(run)
    teacher, student = opened.load_trained(opened.load_parts())
    assert np.any(student.head.kernel[...] != teacher.head.kernel[...])
    rows = predictions(run, "mt_llm")[::5]
    texts, languages = rows["text"].tolist(), rows["language"].tolist()
    export(run, tmp_path / "out", "hf", adapters="merged", rank=None, dtype=None, console=Console())
    for folder in (run, tmp_path / "out"):
        found = mtllm_jax.load(folder).classify(texts, languages)
        assert [next(iter(shares)) for shares in found] == rows["prediction"].tolist()
    assert "stage 2b, the task's labels" in (run / "report.html").read_text().replace("&#39;", "'")
    assert "stage 2b, the task's labels" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_multiple_choice_is_learnt_from_its_labels(mini_run, tmp_path):
    """Far enough that the rows trained on are answered right, which takes a head that learns."""
    write_jsonl(tmp_path / "a.jsonl", CHOICES * 6)
    rows = [row | {"language": "eng_Latn", "id": i} for i, row in enumerate(CHOICES)]
    rows += [row | {"language": "deu_Latn"} for row in rows]
    write_jsonl(tmp_path / "b.jsonl", rows)
    fields = LABELS | {
        "task.train": tmp_path / "a.jsonl",
        "task.test": tmp_path / "b.jsonl",
        "distillation.training.steps": 60,
    }
    run, _ = finished(mini_run, tmp_path, fields)
    frame = predictions(run, "mt_llm")
    english = frame[frame["language"] == "eng_Latn"]
    assert english["prediction"].tolist() == english["label"].tolist()
    first, last = (
        json.loads(line)["loss"]
        for line in (run / "distillation" / "metrics.jsonl").read_text().splitlines()[::59]
    )
    assert last < 0.5 * first
