"""A file of rows → the same rows in other languages: what `launch/translate.py` does.

Of each row the named columns are cut into sentences, lines, list marks, code and the like staying
as they are (`data/formatting`); the sentences of a window are translated together, those of like
length in one batch, and joined again. Rows whose translation is none (`data/translation_filters`)
go to OUTPUT.dropped.jsonl, with the reason; OUTPUT.about.json counts them. As with `predict`, what
a window came to lies in OUTPUT.parts, and a stopped start loses no more than one.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from mtllm_jax import decode, distributed, sharding
from mtllm_jax.answers import check_output, json_line, new_answers, parts_of, rejects_of
from mtllm_jax.config import naming
from mtllm_jax.data import formatting
from mtllm_jax.data.files import cell_value
from mtllm_jax.data.tokenise import TranslationTokenizer, translation_tokenizer
from mtllm_jax.data.translation_filters import Filters, is_untranslatable, reason_against
from mtllm_jax.data.unlabelled import Entry, Window, in_windows, scan
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.locate import locate
from mtllm_jax.hf.nllb import check_nllb, load_nllb
from mtllm_jax.languages import check_language
from mtllm_jax.metrics import Console
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.parts import Parts
from mtllm_jax.predict import check_model, mesh_of
from mtllm_jax.runfolder import new_file, write_json

_SUFFIXES = (".jsonl",)
_WINDOW = 64  # rows

Cells = dict[str, Any]


class Translator(Protocol):
    """What sentences are translated by."""

    def __call__(self, sentences: Sequence[str], target: str) -> list[str]:
        """The sentences in the language `target`."""

    def reads(self, sentences: Sequence[str]) -> list[bool]:
        """Of each sentence, whether it can be read to its end."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How sentences are translated: limits in tokens, and hypotheses that are searched over."""

    max_length: int = 512  # of a sentence; one that is longer is not translated
    max_new_tokens: int = 512
    num_beams: int = 4  # 1 = greedy
    batch_rows: int = 64  # sentences in one pass, rounded up to what the devices can share
    dtype: str = "float32"  # of weights and computation
    fsdp: int = 1  # devices that each copy of the weights is cut over

    def __post_init__(self) -> None:
        for name in ("max_length", "max_new_tokens", "num_beams", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")


def translate(
    model: str,
    rows: str,
    output: str,
    *,
    source: str,
    targets: Sequence[str],
    columns: Sequence[str],
    filters: Filters,
    decoding: Decoding,
    console: Console,
) -> None:
    """Translate the rows of a file, going on where an earlier start stopped.

    model: an NLLB or M2M100 folder, or its name on the hub. rows: .jsonl, .csv, .tsv or .parquet.
    output: .jsonl; for each row and target the row with its `columns` translated, "language" the
    target, and "id" (the row's own, or its line). The first of `columns` is what `filters.tasks`
    looks at. All processes of a job call it; each translates its share, and process 0 writes.

    Raises ValueError, naming the flag or the file and the line, before the model is read where a
    file or flag can be no good, and in the end where nothing is kept.
    """
    filters.check()
    if not all(columns) or not columns:
        raise ValueError("--columns must name one column or several, with commas.")
    target_file = Path(output)

    def look() -> int:
        check_output(output, _SUFFIXES)
        return scan(Path(rows), required=columns, reserved=()).rows

    total = distributed.by_first(look)
    with naming("model", "--"):
        folder = str(distributed.after_first(lambda: locate(model)).folder)
        check_nllb(folder)
        tokenizer = translation_tokenizer(local_files(folder))
    _check_languages(source, targets, tokenizer.languages)
    settings = {
        "model": check_model(folder),
        "source": source,
        "targets": list(targets),
        "columns": list(columns),
        "filters": dataclasses.asdict(filters),
        # How many are translated at a time, and where, is no matter.
        "decoding": dataclasses.asdict(decoding) | {"batch_rows": None, "fsdp": None},
    }
    parts = Parts(parts_of(target_file), settings)
    translator = open_translator(folder, tokenizer, source, decoding)

    def all_windows() -> Iterator[Window]:
        def entry(line: int, cells: Cells) -> Entry:
            return _entry(line, cells, source, columns)

        return in_windows(Path(rows), _WINDOW, entry)

    def run(found: Sequence[Mapping[str, Any]]) -> np.ndarray:
        made = [
            in_language(found, translator, source, target, columns, filters) for target in targets
        ]
        return np.frombuffer(json.dumps(made).encode(), np.uint8)

    count = jax.process_count()
    what = "translating" if count == 1 else f"translating, process 0 of {count}"
    begins = range(jax.process_index() * _WINDOW, total, count * _WINDOW)
    mine = sum(min(_WINDOW, total - begin) for begin in begins)
    with console.progress(mine, what, unit="rows") as progress:
        parts.fill(all_windows(), run, progress.update)
    if not distributed.is_first():
        return
    about = {"model_name": model, **settings, "rows": total}
    with console.progress(total, "writing", unit="rows") as progress:
        counts = _write_out(target_file, targets, all_windows(), parts, about, progress.update)
    parts.remove()
    _tell(target_file, counts, console)


def in_language(
    rows: Sequence[Mapping[str, Any]],
    translator: Translator,
    source: str,
    target: str,
    columns: Sequence[str],
    filters: Filters,
) -> list[Cells]:
    """For each row "cells", its columns translated; "reason", why that is no translation, or "";
    and "told", whether the language of what came was looked at."""
    spoilt = [
        filters.tasks and bool(is_untranslatable(str(row[columns[0]]), source)) for row in rows
    ]
    plans = [
        {} if is_spoilt else {name: formatting.pieces(row[name], source) for name in columns}
        for row, is_spoilt in zip(rows, spoilt, strict=True)
    ]
    all_parts = itertools.chain.from_iterable(plan.values() for plan in plans)
    sentences = list(dict.fromkeys(p.text for parts in all_parts for p in parts if p.is_sentence))
    too_long = {
        text for text, fits in zip(sentences, translator.reads(sentences), strict=True) if not fits
    }
    made = translated(
        [text for text in sentences if text not in too_long], translator, source, target
    )
    answers = []
    for is_spoilt, plan in zip(spoilt, plans, strict=True):
        answer: Cells = {
            "cells": {},
            "reason": "untranslatable" if is_spoilt else "",
            "told": False,
        }
        inside = {p.text for parts in plan.values() for p in parts if p.is_sentence}
        if inside & too_long:
            answer["reason"] = "long"
        elif not all(made[text] for text in inside):
            answer["reason"] = "empty"
        else:
            told = []
            for name, parts in plan.items():
                said = [p.text for p in parts if p.is_sentence]
                text = " ".join(made[sentence] for sentence in said)
                reason, was_told = reason_against(" ".join(said), text, target, filters)
                told.append(was_told)
                answer["reason"] = answer["reason"] or reason
                answer["cells"][name] = formatting.joined(parts, made, source, target)
            answer["told"] = any(told)
        answers.append(answer)
    return answers


def translated(
    sentences: Sequence[str], translator: Translator, source: str, target: str
) -> dict[str, str]:
    """Each sentence's translation. One that lacks a URL, a placeholder, code or a number of its
    sentence is made anew from the parts around these."""

    def said(texts: Sequence[str]) -> dict[str, str]:
        made = translator(texts, target) if texts else []
        return dict(zip(texts, map(str.strip, made), strict=True))

    made = said(sentences)
    broken = {
        text: formatting.around(text)
        for text, new in made.items()
        if new and formatting.lost(text, new)
    }
    inner = dict.fromkeys(p.text for parts in broken.values() for p in parts if p.is_sentence)
    made |= said([text for text in inner if text not in made])
    for text, parts in broken.items():
        whole = all(made[p.text] for p in parts if p.is_sentence)
        made[text] = formatting.joined(parts, made, source, target) if whole else ""
    return made


def open_translator(
    folder: str, tokenizer: TranslationTokenizer, source: str, decoding: Decoding
) -> Translator:
    """A model on all devices of this process."""
    mesh = mesh_of(decoding.fsdp)
    model = load_nllb(folder, mesh=mesh, dtype=decoding.dtype)
    return _Model(model, tokenizer, source, decoding, mesh)


@dataclasses.dataclass(frozen=True)
class _Model:
    """An NLLB or M2M100, with what it is asked of."""

    model: NLLB
    tokenizer: TranslationTokenizer
    source: str
    decoding: Decoding
    mesh: jax.sharding.Mesh

    def __call__(self, sentences: Sequence[str], target: str) -> list[str]:
        limits = self.decoding
        return decode.translate(
            self.model,
            self.tokenizer,
            sentences,
            self.source,
            target,
            max_length=limits.max_length,
            max_new_tokens=limits.max_new_tokens,
            num_beams=limits.num_beams,
            mesh=self.mesh,
            batch_size=sharding.rows_for(limits.batch_rows, self.mesh),
            dtype=limits.dtype,
        )

    def reads(self, sentences: Sequence[str]) -> list[bool]:
        encoded = self.tokenizer.encode(sentences, self.source)
        return [len(ids) <= self.decoding.max_length for ids in encoded]


def _entry(line: int, cells: Cells, source: str, columns: Sequence[str]) -> Entry:
    """A row, its problem where it cannot be translated. Columns behind the first may be blank."""
    try:
        for name in columns:
            cell = "" if cells.get(name) is None else cells[name]
            may_be_blank = name in columns[1:]
            cells[name] = cell_value(cell, str, name, "row", may_be_blank=may_be_blank)
        if cells.get("language") not in (None, "", source):
            raise ValueError(f"row: the language is {cells['language']!r}, it must be {source}.")
    except ValueError as error:
        return Entry(line, cells, str(error).removeprefix("row: ").rstrip("."))
    return Entry(line, cells, "")


def _check_languages(source: str, targets: Sequence[str], readable: Sequence[str]) -> None:
    for flag, code in [("source", source), *(("target", code) for code in targets)]:
        try:
            check_language(code, readable)
        except ValueError as error:
            raise ValueError(f"--{flag}: {error}.") from None
    if len(set(targets)) != len(targets) or source in targets:
        raise ValueError(
            f"--target={','.join(targets)} must name each language once, and not the source's."
        )


def _write_out(
    target_file: Path,
    targets: Sequence[str],
    all_windows: Iterator[Window],
    parts: Parts,
    about: Mapping[str, Any],
    told: Callable[[int], None],
) -> dict[str, Any]:
    """Write what is kept, what is dropped and what cannot be read, each file whole or not at all;
    returns the counts. ValueError as `new_answers`, and where nothing is kept."""
    dropped_file = target_file.with_name(f"{target_file.name}.dropped.jsonl")
    counts: dict[str, Any] = {
        code: {"kept": 0, "dropped": collections.Counter(), "language_not_told": 0}
        for code in targets
    }
    with (
        new_answers(target_file, about["rows"]) as out,
        new_file(epath.Path(dropped_file)) as dropped,
    ):
        for window in all_windows:
            made = json.loads(parts.read(window).tobytes()) if window.rows else []
            answers = zip(*made, strict=True)  # for each row, one of each target
            for entry in window.entries:
                if entry.problem:
                    out.reject(entry, entry.problem)
                    continue
                out.answered += 1
                row_id = entry.cells.get("id")
                named = {"id": str(entry.line) if row_id in (None, "") else row_id}
                for code, answer in zip(targets, next(answers), strict=True):
                    row = {**entry.cells, **named, **answer["cells"], "language": code}
                    count = counts[code]
                    if reason := answer["reason"]:
                        count["dropped"][reason] += 1
                        dropped.write(json_line({"line": entry.line, "reason": reason, "row": row}))
                    else:
                        count["kept"] += 1
                        count["language_not_told"] += not answer["told"]
                        out.file.write(json_line(row))
            told(out.rows)
        reasons: collections.Counter[str] = collections.Counter()
        for count in counts.values():
            reasons.update(count["dropped"])
        if out.answered and not any(count["kept"] for count in counts.values()):
            raise ValueError(f"no translation is kept; of {out.answered} rows: {dict(reasons)}.")
    if not reasons:
        dropped_file.unlink()
    told_file = target_file.with_name(f"{target_file.name}.about.json")
    found = {"rejects": out.rejected, "languages": counts}
    write_json(epath.Path(told_file), {**about, **found})
    return found


def _tell(target_file: Path, counts: Mapping[str, Any], console: Console) -> None:
    languages = counts["languages"]
    reasons = sorted({reason for count in languages.values() for reason in count["dropped"]})
    rows = [
        [code, count["kept"], *(count["dropped"][r] for r in reasons), count["language_not_told"]]
        for code, count in languages.items()
    ]
    columns = ["language", "kept", *reasons, "language not told"]
    console.table(columns, rows, title=str(target_file))
    if counts["rejects"]:
        console.warn(
            f"rows that cannot be translated: {counts['rejects']};"
            f" {rejects_of(target_file)} says why"
        )
