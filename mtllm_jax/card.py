"""The model card of an exported stack: where it comes from, what it reached, how to load it."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from etils import epath
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import mtllm_jax
from mtllm_jax.config import MTLLM
from mtllm_jax.hf.files import local_files
from mtllm_jax.recipes import llm2vec
from mtllm_jax.recipes.finished import FinishedRun
from mtllm_jax.results import (
    TEST_NAMES,
    language_name,
    languages_of,
    percent_factor,
    system_name,
    tests_of,
)
from mtllm_jax.runfolder import is_remote, read_jsonl
from mtllm_jax.tasks.task import TEXTS

_PACKAGES = ("jax", "flax", "transformers")


def model_card(run: FinishedRun, languages: Sequence[str]) -> str:
    """README.md of the folder that a run is exported to.

    languages: the FLORES-200 codes that the encoder reads. Paths of this machine do not appear:
    a local folder is named by its last part.
    """
    first = run.first
    bases = [_base("MT encoder", first.encoder, run.config.encoder)]
    bases.append(_base("LLM", first.llm, run.config.llm))
    # Those that the run has trained for its LLM come behind, and are no base.
    adapters = zip(first.llm_adapters, run.config.llm_adapters, strict=False)
    bases += [_base("adapter merged into the LLM", *names) for names in adapters]
    if first.trained == "lora" and (start := first.lora.start):
        bases.append(_base("what the LLM's own adapter started from", start, start))
    licences = {base["licence"] for base in bases}
    same = licences.pop() if len(licences) == 1 and all(base["hub"] for base in bases) else None
    data = ModelCardData(
        base_model=[base["hub"] for base in bases if base["hub"]] or None,
        eval_results=_eval_results(run),
        language=["multilingual", *sorted({code[:3] for code in _evaluated(run)})],
        library_name="transformers",
        license=same or "other",
        license_name=None if same else "see-base-models",
        model_name=f"MT-LLM, {run.task}",
        pipeline_tag="multiple-choice" if run.num_choices else "text-classification",
        tags=["mt-llm", "cross-lingual", "mtllm_jax"],
    )
    arguments, encode_arguments = _example(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("model_card.md.j2").render(
        header=data.to_yaml(),
        task=run.task,
        labels=run.labels,
        bases=bases,
        data=_data(run.given, first),
        settings=_settings(run.given, first),
        num_languages=len(languages),
        tables=_tables(run.results) if run.results else [],
        seeds=run.results["seeds"] if run.results else [],
        metric=run.results["metric"] if run.results else "",
        auto="MultipleChoice" if run.num_choices else "SequenceClassification",
        function="choose" if run.num_choices else "classify",
        arguments=arguments,
        encode_arguments=encode_arguments,
        versions=", ".join(
            f"{name} {version}"
            for name, version in [
                ("mtllm_jax", mtllm_jax.__version__),
                *((name, importlib.metadata.version(name)) for name in _PACKAGES),
            ]
        ),
    )


def _base(role: str, name: str, folder: str) -> dict[str, str]:
    """One of the two models: its name as others know it, its hub name if it has one, its licence.

    name: what the config says; "" where the run trained the model itself.
    """
    if not name:
        own = "a tiny one, trained in the same run"
        return {"role": role, "name": own, "hub": "", "licence": "none: yours to choose"}
    is_folder = name == folder or is_remote(name)
    return {
        "role": role,
        "name": epath.Path(name).name if is_folder else name,
        "hub": "" if is_folder else name.partition("@")[0],
        "licence": _licence(folder),
    }


def _licence(folder: str) -> str:
    """What the model card in a folder declares."""
    card = local_files(folder, ["README.md"]) / "README.md"
    if not card.is_file():
        return "not stated in its folder"
    data = ModelCard.load(card, ignore_metadata_errors=True).data
    name = data.license if data.license != "other" else data.license_name or data.license
    return name or "not stated in its folder"


def _task_data(config: MTLLM) -> str:
    if config.task.benchmark:
        return f"the training rows of {config.task.benchmark}"
    return epath.Path(config.task.train).name if config.task.train else "lists of names from CLDR"


def _last_part(source: str) -> str:
    """A file's or folder's name alone; that of a data set whole."""
    return source if source.startswith(("tfds:", "hf:")) else epath.Path(source).name


def _data(config: MTLLM, first: MTLLM) -> list[str]:
    """A line for each kind of text that was trained on. first: the config of stage 1."""
    own = ", ".join(map(_last_part, first.adaptation_text))
    if first.stage1:
        own = f"that of {_last_part(first.stage1)}"
    lines = [
        f"general adaptation, English: {own or 'names, lists and facts from CLDR'}",
        f"task, English: {_task_data(config)}",
    ]
    if not first.encoder:
        lines.append("the MT encoder itself: names and lists from CLDR, X → English")
    if not first.llm:
        lines.append("the LLM itself: English names, lists and facts from CLDR")
    return lines


def _settings(config: MTLLM, first: MTLLM) -> dict[str, str]:
    how = "all its layers"
    if config.trained == "lora":
        how = f"LoRA, rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    if config.trained == "bridge":
        how = "nothing but what the teacher learnt" if _adds_teacher(config) else "nothing"
    learns = "the task's labels" if config.distillation.learns == "labels" else "task distillation"
    stages = {
        f"LLM preparation, {title}": first.stages()[f"{name}.training"]
        for name, title in llm2vec.TITLES.items()
        if f"{name}.training" in first.stages()
    }
    if not first.stage1:
        stages["stage 1, general adaptation"] = first.adaptation.training
    stages |= {
        "stage 2a, teacher": config.teacher,
        f"stage 2b, {learns}": config.distillation.training,
    }
    if config.frozen_dtype == "int8":
        how += ", over weights in int8; these here are the weights that were quantised"
    layers = f"the last {config.encoder_layers} layers" if config.encoder_layers else "nothing"
    return {"trained in the encoder": layers, "trained in the LLM": how} | {
        name: f"{stage.steps} steps of {stage.batch_rows} rows, learning rate"
        f" {stage.learning_rate:g}"
        for name, stage in stages.items()
    }


def _adds_teacher(config: MTLLM) -> bool:
    return config.distillation.start == "stage1+teacher"


def _evaluated(run: FinishedRun) -> list[str]:
    return languages_of(run.results) if run.results else []


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One per test: columns are systems, rows English, the mean, then languages."""
    factor = percent_factor(results)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{factor * value:.1f}"

    tables = []
    for test, entries in tests_of(results).items():
        rows = [("English", [shown(entry["english"]) for entry in entries.values()])]
        rows.append(("mean of the others", [shown(entry["mean"]) for entry in entries.values()]))
        rows += [
            (
                f"{language_name(code)} `{code}`",
                [shown(entry["languages"].get(code)) for entry in entries.values()],
            )
            for code in languages_of(results)
        ]
        tables.append(
            {
                "title": TEST_NAMES[test] if len(tests_of(results)) > 1 else "",
                "systems": [system_name(system) for system in entries],
                "rows": rows,
            }
        )
    return tables


def _eval_results(run: FinishedRun) -> list[EvalResult] | None:
    if run.results is None:
        return None
    return [
        EvalResult(
            task_type="multiple-choice" if run.num_choices else "text-classification",
            dataset_type="own",
            dataset_name=run.task,
            dataset_config=f"{test}: mean over languages other than English",
            metric_type=run.results["metric"],
            metric_value=round(entries["mt_llm"]["mean"], 4),
        )
        for test, entries in tests_of(run.results).items()
        if "mt_llm" in entries and entries["mt_llm"]["mean"] is not None
    ]


def _example(run: FinishedRun) -> tuple[str, str]:
    """Arguments of a call with a row of the test, in another language than English where there is
    one: of `classify`, or of `choose`; and of `encode`, with its text."""
    row: dict[str, Any] = {"language": run.config.english, "text": "…"}
    if run.num_choices:
        row = {"language": run.config.english, "context": "…", "question": "…?", "choices": ["…"]}
    path = run.path / "predictions" / "mt_llm.jsonl"
    if path.exists():
        rows = read_jsonl(path)
        row = next((row for row in rows if row["language"] != run.config.english), rows[0])
    cells = {name: json.dumps([row[name]], ensure_ascii=False) for name in TEXTS if name in row}
    lang = f'lang="{row["language"]}"'
    first = next(iter(cells.values()))
    pairs = [f"pairs={cells.pop('text_pair')}"] if "text_pair" in cells else []
    return ", ".join([*cells.values(), lang, *pairs]), ", ".join([first, lang, *pairs])
