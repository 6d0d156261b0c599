"""From what the user names, or from nothing, to the systems that are compared.

D width, C classes.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtllm_jax import distributed, sharding
from mtllm_jax.config import MTLLM
from mtllm_jax.data.babel_tfds import TextDataset, build_text
from mtllm_jax.data.prepared import Prepared
from mtllm_jax.data.tokenise import translation_tokenizer
from mtllm_jax.decode import translate
from mtllm_jax.evaluation import Predict
from mtllm_jax.hf.encoder import has_decoder
from mtllm_jax.hf.files import is_remote, local_files
from mtllm_jax.hf.nllb import load_nllb
from mtllm_jax.inference import Vectors
from mtllm_jax.models.layers import Linear
from mtllm_jax.recipes import mini_models, stacking
from mtllm_jax.recipes.inputs import Inputs
from mtllm_jax.recipes.job import Job, stage_seed
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.tasks.classification import Classification, Row


@dataclasses.dataclass(frozen=True)
class Made:
    """What the stages of a run end with."""

    translator_folder: str | None  # of what translate-test translates with
    parts: stacking.Parts
    task: Classification
    english: Sequence[str] | Prepared  # texts of stage 1
    teacher: stacking.LLMClassifier
    student: stacking.StackClassifier
    mt_encoder: stacking.EncoderClassifier


def train(job: Job[MTLLM], inputs: Inputs) -> Made:
    """All stages up to the systems; the embedded text and models only where nothing is given."""
    config = job.config
    text = functools.cache(lambda: embedded_text(job))
    task = inputs.task or embedded_task(text(), config.evaluation.split)
    english = inputs.adaptation_text or [row["text"] for row in text()["adaptation"]]
    encoder_folder = config.encoder or os.fspath(mini_models.mini_nllb(job, text()))
    llm_folder = config.llm or os.fspath(mini_models.mini_llama(job, text()))
    translator_folder = config.translator or encoder_folder
    translates = has_decoder(translator_folder)
    if not translates:
        job.console.print(
            "Translate-test is left out: config.encoder cannot translate, and config.translator,"
            " which names an NLLB model that can, is empty."
        )
    describe_model(job.run, task, encoder_folder, llm_folder, config.llm_adapters)
    parts = stacking.load_parts(config, encoder_folder, llm_folder, job.mesh, job.console)
    adapted = stacking.general_adaptation(job, parts, english)
    teacher = stacking.task_teacher(job, parts, task)
    student = stacking.task_distillation(job, parts, task, adapted, teacher)
    mt_encoder = stacking.mt_encoder_baseline(job, parts, task)
    return Made(
        translator_folder if translates else None,
        parts,
        task,
        english,
        teacher,
        student,
        mt_encoder,
    )


def embedded_text(job: Job[MTLLM]) -> TextDataset:
    """The text that comes with the package, made in the run folder."""
    config = job.config
    with job.stage("text", "text") as stage:
        text = distributed.after_first(
            lambda: build_text(
                stage.path,
                languages=config.languages,
                seed=stage_seed(config.text_seed, "text"),
                sizes=config.text,
            )
        )
        job.run.write_json("text.json", text.describe())
    return text


def describe_model(
    run: RunFolder, task: Classification, encoder: str, llm: str, llm_adapters: Sequence[str]
) -> None:
    """Write model.json: what, beside config.json, it takes to use the run's weights.

    Folders inside the run are written relative to it, so that it can be moved.
    """
    inside = Path(run.path).absolute()

    def told(folder: str) -> str:
        if is_remote(folder):
            return folder
        path = Path(folder).absolute()
        return str(path.relative_to(inside) if path.is_relative_to(inside) else path)

    about = {
        "task": task.name,
        "labels": task.labels,
        "encoder": told(encoder),
        "llm": told(llm),
        "llm_adapters": [told(folder) for folder in llm_adapters],
    }
    run.write_json("model.json", about)


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


def labels_by(run: Vectors, head: Linear, labels: Sequence[str]) -> Callable[..., list[str]]:
    """Tokens → the label whose column of the head scores highest."""
    kernel_DC = sharding.whole(head.kernel[...]).astype(np.float32)
    return lambda tokens: [labels[i] for i in np.argmax(run(tokens) @ kernel_DC, axis=1)]


def build_systems(job: Job[MTLLM], made: Made) -> dict[str, Predict]:
    """The systems by their names in results.json, each a function from rows to labels."""
    parts, task = made.parts, made.task
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

    causal, dtype = not config.bidirectional, config.compute_dtype
    stack_forward = stacking.stack_forward(made.student.stack, causal=causal, dtype=dtype)
    stack_run = runner(stack_forward, parts.source.pad_id)
    llm_run = runner(stacking.llm_forward(config, made.teacher), parts.target.pad_id)
    encoder_run = runner(stacking.encoder_forward(config, made.mt_encoder), parts.source.pad_id)
    by_stack = labels_by(stack_run, made.student.head, task.labels)
    by_llm = labels_by(llm_run, made.teacher.head, task.labels)
    by_encoder = labels_by(encoder_run, made.mt_encoder.head, task.labels)
    systems: dict[str, Predict] = {
        "mt_llm": lambda rows: by_stack(source_tokens(rows)),
        "llm_zero_shot": lambda rows: by_llm(llm_tokens([row["text"] for row in rows])),
        "mt_encoder": lambda rows: by_encoder(source_tokens(rows)),
    }
    if made.translator_folder is not None:
        into_english = translator(config, made.translator_folder, job.mesh)
        systems["translate_test"] = lambda rows: by_llm(llm_tokens(into_english(rows)))
    return systems


def translator(
    config: MTLLM, folder: str, mesh: jax.sharding.Mesh
) -> Callable[[Sequence[Row]], list[str]]:
    """Rows → their texts in English, translated by a folder's model where they are not in it."""
    legacy = config.legacy_source_order
    tokenizer = translation_tokenizer(local_files(folder), legacy_source_order=legacy)
    # Its layers scanned whatever the config says: token by token that is the faster way.
    model = load_nllb(folder, mesh=mesh)
    limits = config.evaluation

    def into_english(rows: Sequence[Row]) -> list[str]:
        texts = [row["text"] for row in rows]
        foreign = [i for i, row in enumerate(rows) if row["language"] != config.english]
        translated = translate(
            model,
            tokenizer,
            [texts[i] for i in foreign],
            [rows[i]["language"] for i in foreign],
            config.english,
            max_length=limits.max_length,
            max_new_tokens=limits.max_new_tokens,
            num_beams=limits.num_beams,
            mesh=mesh,
            batch_size=limits.batch_rows,
        )
        for i, text in zip(foreign, translated, strict=True):
            texts[i] = text
        return texts

    return into_english
