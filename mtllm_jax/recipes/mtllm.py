"""MT-LLM, from checkpoints to the table (arXiv 2406.12739)."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mtllm_jax import distributed
from mtllm_jax.config import MTLLM
from mtllm_jax.evaluation import evaluate
from mtllm_jax.hf.encoder import has_decoder
from mtllm_jax.metrics import Console, read_metrics
from mtllm_jax.recipes import inputs as given
from mtllm_jax.recipes import llm2vec
from mtllm_jax.recipes.dry_run import dry_run
from mtllm_jax.recipes.finished import begun
from mtllm_jax.recipes.inputs import REVISIONS, Inputs, idle_fields, revisions_of
from mtllm_jax.recipes.job import Job
from mtllm_jax.recipes.prompting import template_of
from mtllm_jax.recipes.systems import build_systems, train
from mtllm_jax.report import write_report
from mtllm_jax.results import probe_tables, results_table
from mtllm_jax.runfolder import RunFolder, changed_since
from mtllm_jax.schema import to_dict
from mtllm_jax.tasks.task import Task
from mtllm_jax.watch import Watch

__all__ = ["dry_run", "idle_fields", "read_inputs", "revisions_of", "run"]

ROWS = "rows.json"  # in a run folder: SHA-256 of the task's rows
_PIECE_BATCHES = 32  # of an evaluation's rows, after which what is answered is kept

TRAINED_STAGES = {
    "mini_nllb": "mini NLLB",
    "mini_llama": "mini Llama",
    **{name: f"LLM preparation, {title}" for name, title in llm2vec.TITLES.items()},
    "adaptation": "stage 1, general adaptation",
    "teacher": "stage 2a, teacher",
    "distillation": "stage 2b, task distillation",
    "mt_encoder": "Encoder + head",
    "translate_train": "translate-train",
}


def read_inputs(config: MTLLM, revisions: Mapping[str, str] = {}) -> Inputs:
    """Open all that the config names, as `inputs.read_inputs` does, and the run it begins with."""
    return given.read_inputs(begun(config), revisions)


def run(config: MTLLM, inputs: Inputs, folder: RunFolder, console: Console, watch: Watch) -> None:
    """Every stage, the evaluation, results.json and report.html; finished stages are skipped.

    config: as given; `inputs` has it with folders for what it names on the hub.
    """
    job = Job(inputs.config, folder, console, inputs.mesh, config.seed, watch)
    if inputs.revisions:
        folder.write_json(REVISIONS, inputs.revisions)
    if inputs.task is not None:
        distributed.by_first(functools.partial(_check_rows, folder, inputs.task))
    made = train(job, inputs)
    with job.stage("evaluation", "evaluation"):
        scores = evaluate(
            made.task,
            build_systems(job, made),
            config.task_seeds,
            english=config.english,
            run=folder,
            console=console,
            # Some minutes' work on a slow machine; a task of few rows is one piece.
            piece_rows=_PIECE_BATCHES * config.evaluation.batch_rows,
        )
    results = {"task": made.task.name, "seeds": list(config.task_seeds)} | scores
    if config.distillation.learns == "labels":
        results["stage_2b"] = "labels"
    if (encoder := inputs.config.encoder) and not has_decoder(encoder):
        results["encoder"] = "text"
    if made.task.translated:
        results["translations"] = "given"
    if not distributed.is_first():
        return
    if made.probes is not None:
        results["probes"] = made.probes
    results |= {"seconds": job.seconds, "time": job.time, "peak_memory_gb": job.peak_memory_gb}
    folder.write_json("results.json", results)
    titles = TRAINED_STAGES
    if config.distillation.learns == "labels":
        titles = titles | {"distillation": "stage 2b, the task's labels"}
    curves = {
        title: read_metrics(folder.path / name / "metrics.jsonl")
        for name, title in titles.items()
        if (folder.path / name / "metrics.jsonl").exists()
    }
    told = facts(job, made.task)
    write_report(folder.path, results, to_dict(config), curves, told, probe_tables(results))
    console.print(results_table(results, folder.path, console.width))


def _check_rows(folder: RunFolder, task: Task) -> None:
    """Write down what the task's rows are; ValueError if an earlier start had others.

    Each stage checks what it trains on, but a stage that is done no longer looks.
    """
    rows = {
        "training": list(task.train),
        "test": {name: list(rows) for name, rows in task.tests.items()},
        "translated test": list(task.translated),
    } | ({"development": list(task.dev)} if task.dev else {})
    digests = {
        kind: hashlib.sha256(json.dumps(given).encode()).hexdigest() for kind, given in rows.items()
    }
    if changed := changed_since(folder.path / ROWS, digests, write=True):
        raise ValueError(
            f"the task's {' and '.join(changed)} rows are not those that {folder.path} began with;"
            " put them back, or choose another workdir."
        )


def facts(job: Job[MTLLM], task: Task) -> dict[str, Any]:
    """Versions and counts, for the report."""
    found = job.facts()
    if job.config.uses_embedded_text():
        text = job.run.read_json("text.json")
        found |= {
            "CLDR": text["cldr"],
            "concepts": text["concepts"],
            "names": f"{text['names']} in English, {text['parallel_names']} in other languages",
        }
    if (encoder := job.config.encoder) and not has_decoder(encoder):
        found["encoder"] = "a text encoder in the place of an MT encoder"
    limits = job.config.evaluation
    if "llm_prompted" in limits.systems:
        found["prompt"] = repr(template_of(limits, task))
    return found | {
        "labelled rows": f"{len(task.train)} in English",
        "test rows": sum(len(rows) for rows in task.tests.values()),
        **({"notes": " ".join(task.notes)} if task.notes else {}),
    }
