"""From what the user names, or from nothing, to the systems that are compared.

D width, C classes.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mtllm_jax import distributed, sharding
from mtllm_jax.checkpoint import tree_hash
from mtllm_jax.config import MTLLM, SYSTEMS
from mtllm_jax.data.babel_tfds import TextDataset, build_text
from mtllm_jax.data.benchmarks import source_language
from mtllm_jax.data.prepared import Prepared
from mtllm_jax.data.texts import Texts, texts_of
from mtllm_jax.data.tokenise import Marked, translation_tokenizer
from mtllm_jax.evaluation import Predict, System
from mtllm_jax.example_flops import reading_flops, stack_flops
from mtllm_jax.hf.encoder import has_decoder
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.nllb import into_one_language
from mtllm_jax.hf.peft import load_merged
from mtllm_jax.hf.stack import is_stack
from mtllm_jax.inference import Vectors
from mtllm_jax.languages import ENGLISH
from mtllm_jax.models.layers import Linear
from mtllm_jax.models.llama import Llama
from mtllm_jax.recipes import llm2vec, mini_models, stacking
from mtllm_jax.recipes.inputs import Inputs
from mtllm_jax.recipes.job import Job, stage_seed
from mtllm_jax.recipes.probes import retrieval
from mtllm_jax.recipes.prompting import prompt_flops, prompted
from mtllm_jax.recipes.translating import (
    Translate,
    drawn_languages,
    in_english,
    out_of_english,
    remembered,
    translator,
)
from mtllm_jax.runfolder import RunFolder, is_remote, scratch
from mtllm_jax.tasks.task import Row, Task, texts_in

_LINEAR_ROWS = 20_000  # training rows that the linear baseline is fitted on, at most
_LINEAR_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse, of its regularisation


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What the stages of the task end with, under one seed."""

    teacher: stacking.LLMClassifier
    student: stacking.StackClassifier
    # None where they are not asked for, or cannot be.
    mt_encoder: stacking.EncoderClassifier | None
    translate_train: stacking.LLMClassifier | None


@dataclasses.dataclass(frozen=True)
class Made:
    """What the stages of a run end with."""

    translator_folder: str | None  # of what translate-test translates with
    llm_folder: str
    llm_adapters: Sequence[str]  # merged into the LLM: the config's, and those of its preparation
    parts: stacking.Parts
    task: Task
    english: Texts | Prepared | None  # texts of stage 1; None where no stage learns from any
    tuned: Mapping[int, Tuned]  # by seed
    probes: Mapping[str, Any] | None  # of `probes.retrieval`, where it is asked for


def train(job: Job[MTLLM], inputs: Inputs) -> Made:
    """All stages up to the systems; the embedded text and models only where nothing is given."""
    config = job.config
    text = functools.cache(lambda: embedded_text(job))
    task = inputs.task or embedded_task(text(), config.evaluation.split, config.evaluates_task)
    task = dataclasses.replace(task, notes=(*task.notes, *inputs.notes))
    english = inputs.adaptation_text
    if english is None and config.reads_english:
        english = texts_of(row["text"] for row in text()["adaptation"])
    encoder_folder = config.encoder or mini_models.mini_nllb(
        job,
        functools.partial(text().__getitem__, "parallel"),
        legacy_source_order=config.legacy_source_order,
    )
    llm_folder = config.llm or mini_models.mini_llama(
        job, "mini Llama, English", functools.partial(_english_texts, text())
    )
    translator_folder, wanted = config.translator or encoder_folder, config.evaluation.systems
    translates = has_decoder(translator_folder)
    if "translate_test" in wanted and not translates and not task.translated:
        job.console.print(
            "Translate-test is left out: config.encoder cannot translate, and config.translator,"
            " which names an NLLB model that can, is empty."
        )
    targets = () if "translate_train" not in wanted else _targets(job, translator_folder, task)
    impossible = {
        "translate_test": not translates and not task.translated,
        "translate_train": not targets,
        "encoder_linear": bool(task.num_choices),  # of choices there is no vector to classify
    }
    if all(impossible.get(name) for name in wanted):
        raise ValueError(
            f"config.evaluation.systems is {wanted}; with this task and these models it must name"
            " another one too."
        )
    for note in task.notes:
        job.console.print(note)
    adapters = llm2vec.prepared_llm(job, llm_folder, english)
    describe_model(job.run, task, encoder_folder, llm_folder, adapters)
    prepared = dataclasses.replace(config, llm_adapters=adapters)
    parts = stacking.load_parts(prepared, encoder_folder, llm_folder, job.mesh, job.console)
    weights = stacking.weights_of(parts)
    stacking.check_weights(job.run.path, weights, write=True)
    if config.stage1:
        if not is_stack(config.stage1):
            stacking.check_weights(epath.Path(config.stage1), weights)
        adapted = stacking.load_adapted(config, parts, job.mesh)
        learnt = {"stage 1": tree_hash(adapted)}
        stacking.check_weights(job.run.path, learnt, write=True, file=stacking.STAGE_1)
    else:
        adapted = stacking.general_adaptation(job, parts, english)

    probed = None if inputs.bitext is None else retrieval(job, parts, adapted, inputs.bitext)

    def tuned(seed: int) -> Tuned:
        first = seed == config.task_seeds[0]
        seeded = dataclasses.replace(job, seed=seed) if first else job.of_seed(seed)
        teacher = stacking.task_teacher(seeded, parts, task)
        if config.distillation.learns == "labels":
            student = stacking.task_tuning(seeded, parts, task, adapted)
        else:
            student = stacking.task_distillation(seeded, parts, task, adapted, teacher)
        alone = "mt_encoder" in wanted
        by_encoder = stacking.mt_encoder_baseline(seeded, parts, task) if alone else None
        on_translated = None
        if targets:
            made = partial(_translated_rows, seeded, translator_folder, task, targets)
            on_translated = stacking.translate_train_baseline(seeded, parts, task, made)
        return Tuned(teacher, student, by_encoder, on_translated)

    return Made(
        translator_folder if translates else None,
        llm_folder,
        adapters,
        parts,
        task,
        english,
        {seed: tuned(seed) for seed in config.task_seeds},
        probed,
    )


def _targets(job: Job[MTLLM], translator_folder: str, task: Task) -> tuple[str, ...]:
    """The evaluated languages that the training rows are translated into; () where it cannot be,
    and a line says why."""
    why = "config.translator, which names an NLLB model that can, is empty"
    if not has_decoder(translator_folder):
        job.console.print(f"Translate-train is left out: the encoder cannot translate, and {why}.")
        return ()
    if into_one_language(translator_folder):
        told = f"{translator_folder} translates into one language alone"
        # Of the mini NLLB that is no news: no run of it has this system.
        if job.config.encoder or job.config.translator:
            job.console.print(f"Translate-train is left out: {told}, and not out of English.")
        return ()
    english, tests = job.config.english, task.tests.values()
    evaluated = dict.fromkeys(row["language"] for rows in tests for row in rows)
    known = translation_tokenizer(local_files(translator_folder)).languages
    targets: dict[str, None] = {}
    for code in evaluated:
        with contextlib.suppress(ValueError):
            source_language(code, known)
            targets[code] = None
    if unknown := ", ".join(code for code in evaluated if code not in targets):
        left_out = "has no rows in" if targets.keys() - {english} else "is left out, for"
        job.console.print(
            f"Translate-train {left_out} {unknown}: {translator_folder} does not know them."
        )
    return tuple(code for code in targets if code != english)


def _translated_rows(
    job: Job[MTLLM], translator_folder: str, task: Task, targets: Sequence[str], stage: epath.Path
) -> list[Row]:
    """The training rows, each in one of the languages."""
    languages = drawn_languages(len(task.train), targets, job.stage_seed("translate_train"))
    english = [{**row, "language": job.config.english} for row in task.train]
    open_model = functools.cache(lambda: translator(job.config, translator_folder, job.mesh))
    return out_of_english(english, languages, open_model, stage / "translations", job.console)


def _english_texts(text: TextDataset) -> list[str]:
    return [row["text"] for row in text["english"]]


def embedded_text(job: Job[MTLLM]) -> TextDataset:
    """The text that comes with the package, made in the run folder; where that is in an object
    store, by each start and process anew, as it is read from local files."""
    config = job.config
    with job.stage("text", "text") as stage:
        text = distributed.after_first(
            lambda: build_text(
                scratch() / "text" if is_remote(stage.path) else stage.path,
                languages=config.languages,
                seed=stage_seed(config.text_seed, "text"),
                sizes=config.text,
            )
        )
        job.run.write_json("text.json", text.describe())
    return text


def describe_model(
    run: RunFolder, task: Task, encoder: str, llm: str, llm_adapters: Sequence[str]
) -> None:
    """Write model.json: what, beside config.json, it takes to use the run's weights.

    Folders inside the run are written relative to it, so that it can be moved.
    """
    inside = Path(run.path).absolute()

    def told(folder: str) -> str:
        if is_remote(folder):
            return folder.removeprefix(f"{run.path}/")
        path = Path(folder).absolute()
        return str(path.relative_to(inside) if path.is_relative_to(inside) else path)

    about = {
        "task": task.name,
        "labels": task.labels,
        "choices": task.num_choices,
        "encoder": told(encoder),
        "llm": told(llm),
        "llm_adapters": [told(folder) for folder in llm_adapters],
    }
    run.write_json("model.json", about)


def embedded_task(text: TextDataset, split: str, dev: bool = False) -> Task:
    """Region of a short list of names, labelled in English alone. dev: with development rows."""

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
    train = rows("task_train")
    labels = tuple(sorted({row["label"] for row in train}))
    seen = [row for row in rows("dev_seen") if row["language"] == ENGLISH] if dev else []
    prompt = "{text} are in"  # as the LLM's own text has it
    return Task("region of a list of names", labels, train, tests, dev=seen, prompt=prompt)


def labels_by(run: Vectors, head: Linear, task: Task) -> Callable[[Marked], list[str]]:
    """Tokens and marks → the label that the head scores highest: a column of it, or a choice."""
    kernel_DC = sharding.whole(head.kernel[...]).astype(np.float32)

    def labels(tokens: Marked) -> list[str]:
        scores = run(*tokens) @ kernel_DC  # [M, C], or of choices [M, C, 1]
        return [task.labels[i] for i in np.argmax(scores.reshape(len(scores), -1), axis=1)]

    return labels


def build_systems(job: Job[MTLLM], made: Made) -> Callable[[int], dict[str, System]]:
    """Seed → its systems by their names in results.json. Translated is once for all seeds."""
    config, task, wanted = job.config, made.task, job.config.evaluation.systems
    translation = None
    if "translate_test" in wanted and made.translator_folder is not None and not task.translated:
        translation = translator(config, made.translator_folder, job.mesh)
    remembering = translation and remembered(translation)
    given = {(row["language"], row["id"]): row for row in task.translated}
    # What no seed changes.
    fixed: dict[str, System] = {}

    def source(rows: Sequence[Row]) -> Marked:
        return stacking.source_tokens(made.parts.source, rows, config.evaluation.max_length)

    def target(rows: Sequence[Row]) -> Marked:
        return stacking.target_tokens(made.parts.target, rows, config.evaluation.max_length)

    def read_by_llm(row: Row) -> bool:
        codes = config.evaluation.llm_languages
        return not codes or row["language"] in (config.english, *codes)

    if "llm_prompted" in wanted:
        told = config.evaluation

        # It may take another LLM to be read, and answers that are there already take none.
        @functools.cache
        def opened() -> Predict:
            llm, dtype = _causal_llm(job, made), config.compute_dtype
            return prompted(told, llm, made.parts.target, task, dtype=dtype, mesh=job.mesh)

        def by_prompt(rows: Sequence[Row]) -> list[str]:
            return opened()(rows)

        fixed["llm_prompted"] = System(
            by_prompt,
            by_prompt,
            read_by_llm,
            seeded=False,
            flops=lambda rows: prompt_flops(told, made.parts.llm, made.parts.target, task, rows),
        )
    # A row of choices has no vector that a linear map could classify.
    if "encoder_linear" in wanted and not task.num_choices:
        by_linear = linear_baseline(job, made.parts, task)
        fixed["encoder_linear"] = System(
            by_linear,
            by_linear,
            seeded=False,
            flops=lambda rows: _summed(source, rows, partial(reading_flops, made.parts.encoder)),
        )

    def is_translated(row: Row) -> bool:
        return row["language"] == config.english or (row["language"], row["id"]) in given

    def of_seed(seed: int) -> dict[str, System]:
        tuned = made.tuned[seed]
        by_stack, by_encoder = _readers(job, made.parts, task, tuned)
        by_llm = _llm_reader(job, made.parts, task, tuned.teacher)
        systems: dict[str, System] = {}

        def of_stack(rows: Sequence[Row]) -> float:
            return _summed(source, rows, partial(stack_flops, tuned.student.stack))

        def of_llm(rows: Sequence[Row]) -> float:
            return _summed(target, rows, partial(reading_flops, tuned.teacher.llm))

        def of_translate_train(rows: Sequence[Row]) -> float:
            assert tuned.translate_train is not None
            return _summed(target, rows, partial(reading_flops, tuned.translate_train.llm))

        def of_encoder(rows: Sequence[Row]) -> float:
            assert tuned.mt_encoder is not None
            return _summed(source, rows, partial(reading_flops, tuned.mt_encoder.encoder))

        def of_translating(rows: Sequence[Row]) -> float:
            assert translation is not None and remembering is not None
            foreign = [row for row in rows if row["language"] != config.english]
            texts = [(text, row["language"]) for row in foreign for text in texts_in(row)]
            known = remembering([text for text, _ in texts], [code for _, code in texts])
            translated = translation.flops([text for text, _ in texts], known)
            return translated + of_llm(in_english(rows, config.english, remembering))

        def by_translating(translate: Translate) -> Predict:
            return lambda rows: by_llm(in_english(rows, config.english, translate))

        def by_given(rows: Sequence[Row]) -> list[str]:
            return by_llm([given.get((row["language"], row["id"]), row) for row in rows])

        systems["mt_llm"] = System(by_stack, by_stack, flops=of_stack)
        systems["llm_zero_shot"] = System(by_llm, by_llm, read_by_llm, flops=of_llm)
        if by_encoder is not None:
            systems["mt_encoder"] = System(by_encoder, by_encoder, flops=of_encoder)
        if given:
            # What its translations cost is not known here.
            systems["translate_test"] = System(by_given, None, is_translated)
        elif translation is not None and remembering is not None:
            cold = by_translating(translation)
            warm = by_translating(remembering)
            systems["translate_test"] = System(warm, cold, flops=of_translating)
        if tuned.translate_train is not None:
            by_translated = _llm_reader(job, made.parts, task, tuned.translate_train)
            systems["translate_train"] = System(
                by_translated, by_translated, read_by_llm, flops=of_translate_train
            )
        systems |= fixed
        return {name: systems[name] for name in SYSTEMS if name in wanted and name in systems}

    return of_seed


def _summed(
    read: Callable[[Sequence[Row]], Marked], rows: Sequence[Row], flops: Callable[[float], float]
) -> float:
    """FLOPs over rows, from those of a text of so many tokens."""
    lengths = collections.Counter(len(ids) for ids in read(rows)[0])
    return sum(count * flops(length) for length, count in lengths.items())


def _causal_llm(job: Job[MTLLM], made: Made) -> Llama:
    """The LLM as it was pretrained: adapters that make it read both ways are none of it."""
    if not made.llm_adapters:
        return made.parts.llm
    dtype = jnp.dtype(job.config.frozen_dtype)
    return load_merged(made.llm_folder, (), dtype=dtype, mesh=job.mesh)


def linear_baseline(job: Job[MTLLM], parts: stacking.Parts, task: Task) -> Predict:
    """Rows → labels by a logistic regression on what the encoder, as it is, makes of a text.

    It is fitted on the English training rows when it is first asked, and draws nothing: it is the
    same for all seeds.
    """
    config, limits = job.config, job.config.evaluation
    run = Vectors(
        *stacking.encoder_forward(config, parts.encoder),
        pad_id=parts.source.pad_id,
        batch_rows=limits.batch_rows,
        mesh=job.mesh,
    )

    def vectors(rows: Sequence[Row]) -> np.ndarray:
        return run(*stacking.source_tokens(parts.source, rows, limits.max_length))

    @functools.cache
    def fitted() -> Pipeline:
        train = task.train[:: max(1, -(-len(task.train) // _LINEAR_ROWS))]
        return linear_classifier(vectors(train), [row["label"] for row in train])

    return lambda rows: [str(label) for label in fitted().predict(vectors(rows))]


def linear_classifier(x_MD: np.ndarray, labels: Sequence[str]) -> Pipeline:
    """Of standardised features; how strongly it is regularised is chosen by cross-validation, where
    each label has two rows or more."""
    rarest = min(collections.Counter(labels).values())
    settings: dict[str, Any] = {"max_iter": 1000}
    if rarest == 1:  # nothing to hold out of a label
        model = LogisticRegression(C=_LINEAR_STRENGTHS[2], **settings)
    else:
        settings |= {"scoring": "accuracy", "l1_ratios": (0.0,), "use_legacy_attributes": False}
        model = LogisticRegressionCV(Cs=_LINEAR_STRENGTHS, cv=min(5, rarest), **settings)
    return make_pipeline(StandardScaler(), model).fit(x_MD, labels)


def _llm_reader(
    job: Job[MTLLM], parts: stacking.Parts, task: Task, tuned: stacking.LLMClassifier
) -> Predict:
    """Rows → labels, by an LLM that reads them in its own tokens."""
    limits = job.config.evaluation
    forward = stacking.llm_forward(job.config, tuned, task.num_choices)
    run = Vectors(*forward, pad_id=parts.target.pad_id, batch_rows=limits.batch_rows, mesh=job.mesh)
    labels = labels_by(run, tuned.head, task)
    return lambda rows: labels(stacking.target_tokens(parts.target, rows, limits.max_length))


def _readers(
    job: Job[MTLLM], parts: stacking.Parts, task: Task, tuned: Tuned
) -> tuple[Predict, Predict | None]:
    """Rows → labels, by the stack and, if it is tuned, by the MT encoder."""
    config, limits = job.config, job.config.evaluation

    def runner(forward_and_state: Any, pad_id: int) -> Vectors:
        return Vectors(
            *forward_and_state, pad_id=pad_id, batch_rows=limits.batch_rows, mesh=job.mesh
        )

    def source(rows: Sequence[Row]) -> Marked:
        return stacking.source_tokens(parts.source, rows, limits.max_length)

    causal, dtype, choices = not config.bidirectional, config.compute_dtype, task.num_choices
    stack_forward = stacking.stack_forward(
        tuned.student.stack, causal=causal, dtype=dtype, num_choices=choices
    )
    by_stack = labels_by(runner(stack_forward, parts.source.pad_id), tuned.student.head, task)
    by_encoder: Predict | None = None
    if tuned.mt_encoder is not None:
        encoder_forward = stacking.encoder_forward(config, tuned.mt_encoder.encoder, choices)
        run = labels_by(runner(encoder_forward, parts.source.pad_id), tuned.mt_encoder.head, task)
        by_encoder = lambda rows: run(source(rows))  # noqa: E731
    return lambda rows: by_stack(source(rows)), by_encoder
