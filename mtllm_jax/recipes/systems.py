"""From what the user names, or from nothing, to the systems that are compared.

D width, C classes.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
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
from mtllm_jax.evaluation import Predict, System
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

IntoEnglish = Callable[[Sequence[Row]], list[str]]  # rows → their texts in English


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What the stages of the task end with, under one seed."""

    teacher: stacking.LLMClassifier
    student: stacking.StackClassifier
    mt_encoder: stacking.EncoderClassifier


@dataclasses.dataclass(frozen=True)
class Made:
    """What the stages of a run end with."""

    translator_folder: str | None  # of what translate-test translates with
    parts: stacking.Parts
    task: Classification
    english: Sequence[str] | Prepared | None  # texts of stage 1; None where it was done before
    tuned: Mapping[int, Tuned]  # by seed


def train(job: Job[MTLLM], inputs: Inputs) -> Made:
    """All stages up to the systems; the embedded text and models only where nothing is given."""
    config = job.config
    text = functools.cache(lambda: embedded_text(job))
    task = inputs.task or embedded_task(text(), config.evaluation.split)
    english = inputs.adaptation_text
    if english is None and not config.stage1:
        english = [row["text"] for row in text()["adaptation"]]
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
    if english is None:
        adapted = stacking.load_adapted(config, parts)
    else:
        adapted = stacking.general_adaptation(job, parts, english)

    def tuned(seed: int) -> Tuned:
        first = seed == config.task_seeds[0]
        seeded = dataclasses.replace(job, seed=seed) if first else job.of_seed(seed)
        teacher = stacking.task_teacher(seeded, parts, task)
        student = stacking.task_distillation(seeded, parts, task, adapted, teacher)
        return Tuned(teacher, student, stacking.mt_encoder_baseline(seeded, parts, task))

    return Made(
        translator_folder if translates else None,
        parts,
        task,
        english,
        {seed: tuned(seed) for seed in config.task_seeds},
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


def build_systems(job: Job[MTLLM], made: Made) -> Callable[[int], dict[str, System]]:
    """Seed → its systems by their names in results.json. Rows are translated once for all seeds."""
    into_english = None
    if made.translator_folder is not None:
        into_english = translator(job.config, made.translator_folder, job.mesh)
    remembering = into_english and remembered(into_english)

    def of_seed(seed: int) -> dict[str, System]:
        tuned = made.tuned[seed]
        found, by_llm = _direct_systems(job, made.parts, made.task, tuned)
        systems = {name: System(predict, predict) for name, predict in found.items()}
        if into_english is not None and remembering is not None:
            systems["translate_test"] = System(
                predict=lambda rows: by_llm(remembering(rows)),
                cold=lambda rows: by_llm(into_english(rows)),
            )
        return systems

    return of_seed


def remembered(into_english: IntoEnglish) -> IntoEnglish:
    """The same, which translates no text twice."""
    known: dict[tuple[str, str], str] = {}

    def translated(rows: Sequence[Row]) -> list[str]:
        keys = [(row["language"], row["text"]) for row in rows]
        fresh = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        if fresh:
            known.update(zip(fresh, into_english(list(fresh.values())), strict=True))
        return [known[key] for key in keys]

    return translated


def _direct_systems(
    job: Job[MTLLM], parts: stacking.Parts, task: Classification, tuned: Tuned
) -> tuple[dict[str, Predict], Callable[[Sequence[str]], list[str]]]:
    """The systems that read rows as they are, and the teacher on texts in English."""
    config, limits = job.config, job.config.evaluation

    def runner(forward_and_state: Any, pad_id: int) -> Vectors:
        return Vectors(
            *forward_and_state, pad_id=pad_id, batch_rows=limits.batch_rows, mesh=job.mesh
        )

    def source_tokens(rows: Sequence[Row]) -> list[np.ndarray]:
        languages = [row["language"] for row in rows]
        texts = [row["text"] for row in rows]
        return parts.source.encode(texts, languages, max_length=limits.max_length)

    causal, dtype = not config.bidirectional, config.compute_dtype
    stack_forward = stacking.stack_forward(tuned.student.stack, causal=causal, dtype=dtype)
    stack_run = runner(stack_forward, parts.source.pad_id)
    llm_run = runner(stacking.llm_forward(config, tuned.teacher), parts.target.pad_id)
    encoder_run = runner(stacking.encoder_forward(config, tuned.mt_encoder), parts.source.pad_id)
    by_stack = labels_by(stack_run, tuned.student.head, task.labels)
    by_teacher = labels_by(llm_run, tuned.teacher.head, task.labels)
    by_encoder = labels_by(encoder_run, tuned.mt_encoder.head, task.labels)

    def by_llm(texts: Sequence[str]) -> list[str]:
        return by_teacher(parts.target.encode(texts, max_length=limits.max_length))

    return {
        "mt_llm": lambda rows: by_stack(source_tokens(rows)),
        "llm_zero_shot": lambda rows: by_llm([row["text"] for row in rows]),
        "mt_encoder": lambda rows: by_encoder(source_tokens(rows)),
    }, by_llm


def translator(config: MTLLM, folder: str, mesh: jax.sharding.Mesh) -> IntoEnglish:
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
