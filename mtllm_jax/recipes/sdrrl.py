"""SDRRL (arXiv 2402.12204): an LLM's own answers, translated and mixed, teach it other languages.

The LLM answers instructions in a resource-rich language; both are translated; of all that, code-
switched copies and a parallel corpus a training set is made, on which the LLM is tuned. It is
compared with the LLM as it is and with the LLM tuned on other sets: references, translated or not,
and its own without one of its parts. Where it is asked for, it goes on from there on policy.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import sacrebleu
from etils import epath

from mtllm_jax import distributed, scores
from mtllm_jax.config import SDRRL
from mtllm_jax.data.babel_instructions import Instructions
from mtllm_jax.data.formats import json_records
from mtllm_jax.data.transfer.held_out import normalised
from mtllm_jax.metrics import Console, read_metrics
from mtllm_jax.recipes import mini_models, transferring
from mtllm_jax.recipes.inputs import REVISIONS, revisions_of
from mtllm_jax.recipes.job import Job, stage_seed
from mtllm_jax.recipes.likelihood import bits
from mtllm_jax.recipes.on_policy import both_languages, on_policy
from mtllm_jax.recipes.sdrrl_inputs import Inputs, idle_fields, read_inputs
from mtllm_jax.recipes.transferring import Material
from mtllm_jax.recipes.tuning import tune
from mtllm_jax.report import write_report
from mtllm_jax.results import bits_tables, chrf_tables, next_steps, results_table, system_name
from mtllm_jax.runfolder import RunFolder, is_remote, read_jsonl, write_jsonl
from mtllm_jax.sampling import Sampling
from mtllm_jax.schema import to_dict
from mtllm_jax.watch import Watch

__all__ = ["dry_run", "idle_fields", "read_inputs", "revisions_of", "run"]

_SCOPE = (
    "It shows the mechanism at work: what an LLM's own English answers, translated, teach it in "
    "other languages. It does not show how good the method is on real text: instructions are a "
    "name and a mark, answers are names, both models are tiny and were trained in this run, and "
    "the LLM has read every fact: in English as an instruction, in the other languages as two "
    "names side by side, of which nothing was asked."
)
_OWN_SCOPE = (
    "These numbers hold for the models and rows of this run. Texts of the test may have been part "
    "of what the models were pretrained on; nothing here rules that out."
)


def dry_run(inputs: Inputs, console: Console) -> None:
    """There is none: a set cannot be made of the answers of a model that has not been trained."""
    raise ValueError(
        "--dry_run is for configs/mtllm.py; everything that this config names is checked at each"
        " start, before anything is trained."
    )


def run(config: SDRRL, inputs: Inputs, folder: RunFolder, console: Console, watch: Watch) -> None:
    """Every stage, the evaluation, results.json and report.html; finished stages are skipped.

    config: as given; `inputs` has it with folders for what it names on the hub.
    """
    if is_remote(folder.path):
        raise ValueError(
            f"workdir {folder.path} is remote; a run of SDRRL must lie in a local folder."
        )
    job = Job(inputs.config, folder, console, inputs.mesh, config.seed, watch)
    if inputs.revisions:
        folder.write_json(REVISIONS, inputs.revisions)

    @functools.cache
    def instructions() -> Instructions:
        return Instructions(config.languages, stage_seed(config.text_seed, "text"))

    material = inputs.own or transferring.embedded(config, instructions())
    translator = inputs.config.translator
    if config.translates and not translator:
        translator = mini_models.mini_nllb(
            job, lambda: _name_pairs(config, instructions()), both_ways=True
        )
    llm = inputs.config.llm or mini_models.mini_llama(
        job, "mini Llama, which answers in English", lambda: instructions().llm_texts()
    )
    answers = transferring.own_answers(job, llm, material)
    translations = None
    if config.translates:
        columns = material.columns(config.sets.values())
        translations = transferring.translated(job, translator, answers, columns)
    sets = transferring.transfer_sets(job, material, answers, translations)
    models = {"base": llm} | {
        name: tune(job, name, f"{system_name(name)}, tuned", llm, examples)
        for name, examples in sets.items()
    }
    titles = {name: system_name(name) for name in sets}
    if "on_policy" in config.systems and translations is not None:
        title = system_name("on_policy")
        asked = both_languages(answers, translations, config.languages, material.held_out())
        models["on_policy"] = on_policy(job, models["sdrrl"], asked, title)
        titles |= {
            f"on_policy/{i + 1}": f"{title}, {i + 1}" for i in range(config.on_policy.rounds)
        }
    with job.stage("evaluation", "evaluation") as stage:
        predictions = folder.path / "predictions"
        distributed.by_first(lambda: predictions.mkdir(parents=True, exist_ok=True))
        if material.tests:
            write_jsonl(stage.path / "prompts.jsonl", material.tests)
            found = _asked(job, stage.path / "prompts.jsonl", material, models)
        else:
            found = _read(job, material, models)
    if not distributed.is_first():
        return
    results = found | {
        "seconds": job.seconds,
        "time": job.time,
        "peak_memory_gb": job.peak_memory_gb,
    }
    folder.write_json("results.json", results)
    curves = {
        title: read_metrics(folder.path / name / "metrics.jsonl")
        for name, title in {
            "mini_nllb": "mini NLLB",
            "mini_llama": "mini Llama",
            **titles,
        }.items()
        if (folder.path / name / "metrics.jsonl").exists()
    }
    facts = job.facts() | {
        "scope": _OWN_SCOPE if config.llm or config.translator else _SCOPE,
        "training instructions": len(material.prompts),
        "test rows": len(material.tests or material.lines),
        "examples": ", ".join(f"{system_name(name)} {len(sets[name])}" for name in sets),
        "gains": " ".join(results["gains"]),
    }
    steps = next_steps(Path(folder.path), config.recipe, config.systems)
    tables = [*chrf_tables(results), *bits_tables(results)]
    write_report(folder.path, results, to_dict(config), curves, facts, tables, steps)
    console.print(results_table(results, folder.path, console.width))


def _name_pairs(config: SDRRL, instructions: Instructions) -> list[mini_models.Pair]:
    """What the mini NLLB is trained on."""
    return [
        {"text": there, "english": here, "language": code, "kind": "name"}
        for code in config.languages
        for here, there in instructions.pairs(code)
    ]


# ---------------------------------------------------------------- evaluation


def _asked(
    job: Job[SDRRL], prompts: epath.Path, material: Material, models: Mapping[str, str]
) -> dict[str, Any]:
    """What the systems answer to the test rows, in results.json's terms: always their likeliest
    token, so that no lot decides between them."""
    penalty = job.config.answering.repetition_penalty
    likeliest = Sampling(temperature=0.0, repetition_penalty=penalty)
    said = {}
    for name in job.config.systems:
        file = job.run.path / "predictions" / f"{name}.jsonl"
        answers = transferring.answered(job, models[name], prompts, file, sampling=likeliest)
        said[name] = _said(material, answers)
    return _results(job.config, said)


def _read(job: Job[SDRRL], material: Material, models: Mapping[str, str]) -> dict[str, Any]:
    """How likely the systems find the held-out sentences, in results.json's terms."""
    texts = [line["text"] for line in material.lines]
    read = {}
    for name in job.config.systems:
        file = job.run.path / "predictions" / f"{name}.jsonl"
        if not distributed.by_first(file.exists):
            found = bits(job, models[name], texts).tolist()
            rows = zip(material.lines, found, strict=True)
            write_jsonl(file, [{**line, "bits": value} for line, value in rows])
            distributed.meet()  # process 0 has written it
        read[name] = pd.DataFrame(read_jsonl(file))
    return _likelihoods(job.config, read)


def _likelihoods(config: SDRRL, read: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """results.json but for times, from each system's rows: id, document, language, text, bits.

    Bits are those of all sentences by all their characters (Unicode code points), so that lengths
    of tokens make no difference; what a system changes is against the LLM as it is, row by row. A
    first token that nothing stands before has no bits, whatever the system. Intervals are over
    documents, whose sentences are alike.
    """
    sizes = {name: rows.assign(size=rows["text"].str.len()) for name, rows in read.items()}
    about = ["id", "document", "language", "size"]

    def ratios(rows: pd.DataFrame, values: pd.Series) -> dict[str, Any]:
        by_document = rows[["language", "size"]].assign(id=rows["document"], value=values)
        return scores.ratios(by_document, config.english)

    found = {name: ratios(rows, rows["bits"]) for name, rows in sizes.items()}
    changes = {}
    for name in (name for name in sizes if "base" in sizes and name != "base"):
        both = sizes[name].merge(sizes["base"], on=about, suffixes=("", "_before"))
        changes[name] = ratios(both, both["bits"] - both["bits_before"])
    systems = {}
    for name, rows in sizes.items():
        probabilities = rows[["id", "language"]].assign(right=2.0 ** (-rows["bits"] / rows["size"]))
        systems[name] = scores.summary(probabilities, config.english)
    return {
        "recipe": config.recipe,
        "task": f"held-out sentences of {config.own.parallel}",
        "metric": "probability of a character, geometric mean of each sentence",
        "seeds": [config.seed],
        "systems": systems,
        "bits_per_character": {
            "source": config.english,
            "systems": found,
            "changes": changes,
        },
        "gains": [
            sentence
            for name, change in changes.items()
            for sentence in _told(name, change, config.english)
        ],
    }


def _told(name: str, change: Mapping[str, Any], english: str) -> list[str]:
    """Sentences on what a system changes in bits per character: less is likelier."""
    low, high = change["interval"]
    verdict = "likelier" if high < 0 else "less likely" if low > 0 else "neither likelier nor less"
    ours, base = system_name(name), system_name("base")
    said = [
        f"To {ours} held-out sentences in the targets are {verdict} than to {base}:"
        f" {change['mean']:+.3f} bits per character, 95 % {low:+.3f} to {high:+.3f}."
    ]
    intervals = change["intervals"]
    codes = [code for code in change["languages"] if intervals[code][1] >= 0]
    if codes:
        said.append(f"No gain is told in {', '.join(codes)}.")
    if change["english"] is not None:
        low, high = intervals[english]
        said.append(
            f"English: {change['english']:+.3f} bits per character, 95 % {low:+.3f} to {high:+.3f}."
        )
    return said


def _said(material: Material, file: Path) -> pd.DataFrame:
    """A file of answers to the test rows: id, language, reference, answer; "" where a row has none
    (a prompt beyond the context, which is among the file's rejects)."""
    found = {(row["id"], row["language"]): row["answer"] for _, row in json_records(file)}
    return pd.DataFrame(
        [
            {
                "id": row["id"],
                "language": row["language"],
                "reference": row["reference"],
                "answer": found.get((row["id"], row["language"]), ""),
            }
            for row in material.tests
        ]
    )


def _results(config: SDRRL, said: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """results.json but for times.

    An answer is right that is the reference but for case, blanks and punctuation. chrF is the mean
    of sacrebleu's sentence scores, over 100.
    """
    chrf = sacrebleu.CHRF()
    systems, judged = {}, {}
    for name, rows in said.items():
        about = rows[["id", "language"]]
        judged[name] = about.assign(
            label=rows["reference"].map(normalised), prediction=rows["answer"].map(normalised)
        )
        pairs = zip(rows["answer"], rows["reference"], strict=True)
        each = [chrf.sentence_score(ours, [theirs]).score / 100 for ours, theirs in pairs]
        right = judged[name]["label"].eq(judged[name]["prediction"]).astype(float)
        systems[name] = scores.summary(about.assign(right=right), config.english)
        systems[name]["chrf"] = scores.summary(about.assign(right=each), config.english)
    return {
        "recipe": config.recipe,
        "task": "held-out instructions"
        if config.own.tests
        else "facts about names, asked in each language",
        "metric": "accuracy",
        "seeds": [config.seed],
        "systems": systems,
        "chrf": str(chrf.get_signature()),
        "gains": _gains(config.english, systems, judged),
    }


def _gains(
    english: str, systems: Mapping[str, Any], judged: Mapping[str, pd.DataFrame]
) -> list[str]:
    """Sentences on what SDRRL gains, and on what it does not."""
    if "sdrrl" not in systems:
        return []
    said = []
    ours = judged["sdrrl"]
    for other in (name for name in systems if name not in ("sdrrl", "sft", "sdft")):
        foreign = [rows[rows["language"] != english] for rows in (ours, judged[other])]
        found = scores.compare(*foreign)
        low, high = (100 * x for x in found["interval"])
        verdict = "above" if low > 0 else "below" if high < 0 else "not told apart from"
        said.append(
            f"{system_name('sdrrl')} is {verdict} {system_name(other)} in the targets, row by"
            f" row: {100 * found['difference']:+.1f} points, 95 % {low:+.1f} to {high:+.1f}."
        )
    if "base" in systems and systems["base"]["english"] is not None:
        in_english = [rows[rows["language"] == english] for rows in (ours, judged["base"])]
        found = scores.compare(*in_english)
        low, high = (100 * x for x in found["interval"])
        said.append(
            f"English: {100 * found['difference']:+.1f} points against {system_name('base')}, 95 %"
            f" {low:+.1f} to {high:+.1f}."
        )
    return said
