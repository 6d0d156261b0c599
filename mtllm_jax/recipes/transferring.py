"""What SDRRL and its baselines train on: an LLM's own answers, their translations, and sets made of
both. Each is a file or a folder of the run, which the tools of `launch/` write too."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from mtllm_jax import distributed
from mtllm_jax.config import SDRRL, TransferSet
from mtllm_jax.data.babel_instructions import Instructions
from mtllm_jax.data.formats import json_records
from mtllm_jax.data.transfer import rows
from mtllm_jax.data.transfer.build import Inputs, Transfer, build
from mtllm_jax.data.transfer.held_out import HeldOut
from mtllm_jax.data.transfer.lexicon import Lexicon, lexicon_of
from mtllm_jax.data.transfer.parallel import Pair
from mtllm_jax.data.translation_filters import Filters
from mtllm_jax.generate import Decoding, generate
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import StageFolder, write_jsonl
from mtllm_jax.sampling import Sampling
from mtllm_jax.translate import Decoding as TranslationDecoding
from mtllm_jax.translate import translate

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Material:
    """What a run starts from beside its models.

    prompts: instructions in the resource-rich language, with "id", "prompt" and, if all have one,
    "reference". tests: held-out ones in all languages, with "language" too. lexicons, parallel: as
    of `transfer.build.Inputs`. lines: where there are no tests, held-out sentences with "id",
    "language" and "text". rejects: rows of the user's file that cannot be used. evaluations: texts
    that the systems may be asked elsewhere.
    """

    prompts: Sequence[Row]
    tests: Sequence[Row]
    lexicons: Mapping[tuple[str, str], Lexicon]
    parallel: Mapping[str, Sequence[Pair]]
    lines: Sequence[Row] = ()
    rejects: Sequence[Row] = ()
    evaluations: Sequence[str] = ()

    def columns(self, sets: Iterable[TransferSet]) -> tuple[str, ...]:
        """The texts of a prompt that has been answered, that these sets are made of translations
        of: no row is lost by a translation that nothing is made of."""
        wanted = {made.answers for made in sets if made.translates}
        return ("prompt", *(name for name in rows.ANSWERS if name in wanted))

    def held_out(self) -> HeldOut:
        """What nothing is trained on that says it."""
        lines = (row["text"] for row in self.lines)
        return HeldOut([*(row["prompt"] for row in self.tests), *lines, *self.evaluations])


def embedded(config: SDRRL, instructions: Instructions) -> Material:
    """That which comes with the package: the names that are asked about and answered are the
    parallel corpus, and the lexicon."""
    pairs = {code: instructions.pairs(code) for code in config.languages}
    both_ways: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for code, names in pairs.items():
        both_ways[config.english, code] = names
        both_ways[code, config.english] = [(there, here) for here, there in names]
    asked = {"train": config.train_instructions, "test": config.test_instructions}
    chosen = {
        split: {item.id for item in instructions.items[split][: count or None]}
        for split, count in asked.items()
    }

    def rows_in(split: str, code: str) -> list[dict[str, Any]]:
        return [row for row in instructions.rows(split, code) if row["id"] in chosen[split]]

    return Material(
        prompts=[
            {name: row[name] for name in ("id", "prompt", "reference")}
            for row in rows_in("train", config.english)
        ],
        tests=[
            row for code in (config.english, *config.languages) for row in rows_in("test", code)
        ],
        lexicons={
            (source, target): lexicon_of("CLDR", source, target, {a: (b,) for a, b in names})
            for (source, target), names in both_ways.items()
        },
        parallel={
            code: [Pair(f"cldr:{i}", *pair) for i, pair in enumerate(names)]
            for code, names in pairs.items()
        },
    )


# ---------------------------------------------------------------- answers and translations


def answered(
    job: Job[SDRRL],
    folder: str,
    prompts: epath.Path,
    output: epath.Path,
    *,
    seed: int | None = None,
    sampling: Sampling | None = None,
    keep_ids: bool = False,
) -> Path:
    """The file `output` of a file of prompts and an LLM's answers to them; one that is there is
    kept. seed, sampling: by default the run's, and as `config.answering` says. keep_ids: as of
    `generate`."""
    config, how = job.config, job.config.answering
    file = Path(output)
    if distributed.by_first(file.exists):
        return file
    decoding = Decoding(
        template=how.template,
        system=how.system,
        sampling=sampling
        or Sampling(how.temperature, how.top_k, how.top_p, how.repetition_penalty),
        max_new_tokens=how.max_new_tokens,
        stop=(),
        seed=job.stage_seed("answers") if seed is None else seed,
        batch_rows=how.batch_rows,
        dtype=config.compute_dtype,
    )
    generate(
        folder,
        os.fspath(prompts),
        os.fspath(file),
        decoding,
        fsdp=1,
        console=job.console,
        keep_ids=keep_ids,
    )
    distributed.meet()  # process 0 has written it
    return file


def own_answers(job: Job[SDRRL], llm: str, material: Material) -> Path:
    """What the LLM itself answers to the training instructions; and, where that is trained on, the
    references in its own words."""
    with job.stage("answers", "the LLM's own answers") as stage:
        write_jsonl(stage.path / "prompts.jsonl", material.prompts)
        if material.rejects:
            write_jsonl(stage.path / "rejects.jsonl", material.rejects)
            job.console.warn(
                f"instructions that cannot be used: {len(material.rejects)};"
                f" {stage.path / 'rejects.jsonl'} says why"
            )
        file = answered(job, llm, stage.path / "prompts.jsonl", stage.path / "answers.jsonl")
        rewrites = any(made.answers == "rewritten" for made in job.config.sets.values())
        return _with_rewritten(job, llm, file, stage) if rewrites else file


def _with_rewritten(job: Job[SDRRL], llm: str, answers: Path, stage: StageFolder) -> Path:
    given = [row for _, row in json_records(answers)]
    asked, output = stage.path / "rewriting.jsonl", stage.path / "rewritten.jsonl"
    write_jsonl(asked, rows.rewriting_prompts(given, job.config.transfer.rewriting_prompt))
    said = [row for _, row in json_records(answered(job, llm, asked, output))]
    whole = stage.path / "with_rewritten.jsonl"
    write_jsonl(whole, rows.with_rewritten(given, said))
    distributed.meet()  # process 0 has written it
    return Path(whole)


def translated(job: Job[SDRRL], translator: str, answers: Path, columns: Sequence[str]) -> Path:
    """The columns of a file of answered instructions in the targets."""
    config, how = job.config, job.config.translating
    with job.stage("translations", "their translations") as stage:
        file = Path(stage.path / "translations.jsonl")
        if distributed.by_first(file.exists):
            return file
        translate(
            translator,
            os.fspath(answers),
            os.fspath(file),
            source=config.english,
            targets=config.languages,
            columns=columns,
            filters=Filters(language=how.check_language, tasks=how.check_tasks),
            decoding=TranslationDecoding(
                max_new_tokens=how.max_new_tokens,
                num_beams=how.num_beams,
                batch_rows=how.batch_rows,
                dtype=config.compute_dtype,
            ),
            console=job.console,
        )
        distributed.meet()
    return file


# ---------------------------------------------------------------- sets


def transfer_sets(
    job: Job[SDRRL], material: Material, answers: Path, translations: Path | None
) -> dict[str, Transfer]:
    """The training rows of each system that is trained. ValueError where one has none."""
    config = job.config
    held_out = material.held_out()
    found = {}
    with job.stage("transfer", "what is trained on") as stage:
        for system, settings in config.sets.items():
            columns = [
                settings.answers,
                *(["reference"] if settings.answer_filter != "none" else []),
            ]
            read, bad = rows.read_rows(answers, columns)
            if translations is not None:
                read, more = rows.read_translations(translations, read, columns, config.languages)
                bad += more
            inputs = Inputs(
                rows=read,
                lexicons=material.lexicons,
                parallel=material.parallel,
                held_out=held_out,
                answer_filter=rows.answer_filter(settings),
                model=config.llm or "mini_llama",
                translator=config.translator or "mini_nllb",
                rejects=bad,
            )
            found[system] = build(Path(stage.path / system), settings, inputs)
            counts = found[system].manifest["counts"]
            told = ", ".join(f"{kind} {count}" for kind, count in counts.items())
            job.console.print(f"{system}: {len(found[system])} examples ({told})")
    return found
