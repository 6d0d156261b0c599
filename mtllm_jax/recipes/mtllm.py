"""MT-LLM, from checkpoints to the table (arXiv 2406.12739): the order of things.

D width, C classes.
"""

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_jax.config import MTLLM
from mtllm_jax.data.babel_tfds import TextDataset, build_text
from mtllm_jax.data.files import read_rows, read_texts
from mtllm_jax.decode import translate
from mtllm_jax.evaluation import Predict, evaluate
from mtllm_jax.hf.nllb import load_nllb
from mtllm_jax.inference import Vectors
from mtllm_jax.metrics import Console, read_metrics
from mtllm_jax.models.layers import Linear
from mtllm_jax.recipes import mini_models, stacking
from mtllm_jax.recipes.job import Job
from mtllm_jax.report import write_report
from mtllm_jax.results import results_table
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.tasks.classification import Classification, Row

TRAINED_STAGES = {
    "mini_nllb": "mini NLLB",
    "mini_llama": "mini Llama",
    "adaptation": "stage 1, general adaptation",
    "teacher": "stage 2a, teacher",
    "distillation": "stage 2b, task distillation",
    "mt_encoder": "MT encoder + head",
}


def run(config: MTLLM, folder: RunFolder, console: Console, dry_run: bool = False) -> None:
    """Every stage, then the evaluation, results.json and report.html; finished stages are skipped."""
    job = Job.start(config, folder, console)
    with job.stage("text", "text") as stage:
        text = build_text(
            stage.path,
            languages=config.languages,
            seed=job.stage_seed("text"),
            sizes=config.text,
        )
        folder.write_json("text.json", text.describe())
    task = embedded_task(text, config.evaluation.split)
    english = [row["text"] for row in text["adaptation"]]
    encoder_folder = Path(config.encoder) if config.encoder else mini_models.mini_nllb(job, text)
    llm_folder = Path(config.llm) if config.llm else mini_models.mini_llama(job, text)
    parts = stacking.load_parts(config, encoder_folder, llm_folder)
    adapted = stacking.general_adaptation(job, parts, english)
    teacher = stacking.task_teacher(job, parts, task)
    student = stacking.task_distillation(job, parts, task, adapted, teacher)
    mt_encoder = stacking.mt_encoder_baseline(job, parts, task)
    with job.stage("evaluation", "evaluation"):
        systems = build_systems(
            job,
            parts,
            task,
            encoder_folder,
            teacher=teacher,
            student=student,
            mt_encoder=mt_encoder,
        )
        scores = evaluate(task, systems, english=config.english, run=folder, console=console)
    results = {"task": task.name, "seeds": [config.seed]} | scores | {"seconds": job.seconds}
    folder.write_json("results.json", results)
    curves = {
        title: read_metrics(Path(folder.path / name / "metrics.jsonl"))
        for name, title in TRAINED_STAGES.items()
        if (folder.path / name / "metrics.jsonl").exists()
    }
    write_report(folder.path, results, folder.read_json("config.json"), curves, facts(text))
    console.print(results_table(results, folder.path, console.width))


def embedded_task(text: TextDataset, split: str) -> Classification:
    """Region of a short list of names, labelled in English alone."""

    def rows(name: str) -> list[Row]:
        return [
            {
                "id": str(row["id"]),
                "text": row["text"],
                "language": row["language"],
                "label": text.labels[row["label"]],
            }
            for row in text[name]
        ]

    tests = {test: rows(f"{split}_{test}") for test in ("seen", "unseen")}
    return Classification("region of a list of names", rows("task_train"), tests)


def facts(text: TextDataset) -> dict[str, Any]:
    """Versions and counts, for the report."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "CLDR": text.describe()["cldr"],
    }


def labels_by(run: Vectors, head: Linear, labels: Sequence[str]) -> Callable[..., list[str]]:
    """Tokens → the label whose column of the head scores highest."""
    kernel_DC = np.asarray(head.kernel[...], np.float32)
    return lambda tokens: [labels[i] for i in np.argmax(run(tokens) @ kernel_DC, axis=1)]


def build_systems(
    job: Job[MTLLM],
    parts: stacking.Parts,
    task: Classification,
    encoder_folder: Path,
    *,
    teacher: stacking.LLMClassifier,
    student: stacking.StackClassifier,
    mt_encoder: stacking.EncoderClassifier,
) -> dict[str, Predict]:
    """The systems by their names in results.json, each a function from rows to labels."""
    config, limits = job.config, job.config.evaluation

    def runner(forward_and_state: Any, pad_id: int) -> Vectors:
        return Vectors(
            *forward_and_state, pad_id=pad_id, batch_rows=limits.batch_rows, mesh=job.mesh
        )

    def source_tokens(rows: Sequence[Row]) -> list[np.ndarray]:
        languages = [row["language"] for row in rows]
        texts = [row["text"] for row in rows]
        return parts.source.encode(texts, languages, max_length=limits.max_length)

    def llm_tokens(texts: Sequence[str]) -> list[np.ndarray]:
        return parts.target.encode(texts, max_length=limits.max_length)

    stack_run = runner(stacking.stack_forward(config, student), parts.source.pad_id)
    llm_run = runner(stacking.llm_forward(config, teacher), parts.target.pad_id)
    encoder_run = runner(stacking.encoder_forward(config, mt_encoder), parts.source.pad_id)
    by_stack = labels_by(stack_run, student.head, task.labels)
    by_llm = labels_by(llm_run, teacher.head, task.labels)
    by_encoder = labels_by(encoder_run, mt_encoder.head, task.labels)
    translator = load_nllb(encoder_folder, unroll_layers=config.unroll_layers)

    def translate_test(rows: Sequence[Row]) -> list[str]:
        texts = [row["text"] for row in rows]
        foreign = [i for i, row in enumerate(rows) if row["language"] != config.english]
        translated = translate(
            translator,
            parts.source,
            [texts[i] for i in foreign],
            [rows[i]["language"] for i in foreign],
            config.english,
            max_new_tokens=limits.max_new_tokens,
            batch_size=limits.batch_rows,
        )
        for i, text in zip(foreign, translated, strict=True):
            texts[i] = text
        return by_llm(llm_tokens(texts))

    return {
        "mt_llm": lambda rows: by_stack(source_tokens(rows)),
        "llm_zero_shot": lambda rows: by_llm(llm_tokens([row["text"] for row in rows])),
        "mt_encoder": lambda rows: by_encoder(source_tokens(rows)),
        "translate_test": translate_test,
    }
