"""A file of prompts → a file of what an LLM answers: what `launch/generate.py` does.

The input is read three times, a window of rows at a time: once to know at the door what is wrong
with it, once for the model, whose tokens go to OUTPUT.parts a batch at a time (`parts`), and once
to be written out with its answers.

A row is answered in a batch of prompts that fill as many slots. How many those are follows from its
own length and those of all the file, and its random numbers from its id and prompt: the rows beside
it and their order change nothing.

T new tokens.
"""

import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtllm_jax import distributed
from mtllm_jax.answers import check_output, json_line, new_answers, parts_of, rejects_of
from mtllm_jax.config import naming
from mtllm_jax.data.files import cell_value
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.data.unlabelled import Entry, Window, in_windows, scan
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.llama import check_llama, load_llama, stop_ids
from mtllm_jax.hf.locate import locate
from mtllm_jax.metrics import Console
from mtllm_jax.parts import Parts
from mtllm_jax.predict import check_model, mesh_of
from mtllm_jax.sampling import NO_NUMBER, Sampler, Sampling

_SUFFIXES = (".jsonl",)
_ANSWER, _ENDED, _IDS = "answer", "ended", "answer_ids"
_WINDOW_BATCHES = 64  # batches' worth of rows that are sorted by length
_FEWEST = 32  # prompts that have slots of a number of their own


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made, whatever the rows.

    template, system: as of `templates.Template`. max_new_tokens: of an answer, its stop token
    included. stop: tokens that end an answer beside the model's own. seed: another one, other
    answers. batch_rows: prompts that each device answers at a time. dtype: of weights and
    computation.
    """

    template: str
    system: str
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int
    batch_rows: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class _Prompt(Entry):
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Prompts that are answered together, as `parts` has windows. places: in their window's rows.
    place: of the batch among all."""

    place: int
    places: list[int]
    rows: list[dict[str, Any]]

    @property
    def size(self) -> int:
        return len(self.rows)


def generate(
    model: str,
    rows: str,
    output: str,
    how: Decoding,
    *,
    fsdp: int,
    console: Console,
    keep_ids: bool = False,
) -> None:
    """Answer the prompts of a file, going on where an earlier start stopped.

    model: an LLM's folder, or its name on the hub. rows: a file with a column "prompt" and perhaps
    "id". output: .jsonl, to hold the rows as they were with "answer" and "ended", which is false
    where an answer was cut at max_new_tokens. Rows that have none go to OUTPUT.rejects.jsonl with
    the reason. fsdp: devices that each copy of the weights is cut over. keep_ids: have "answer_ids"
    too, the tokens as they were drawn but that which ended them. All processes of a job call it:
    each answers its share of batches, and process 0 writes.

    Raises ValueError, naming the flag or the file and the line, before weights are read where a
    file or flag can be no good.
    """
    target = Path(output)
    mesh = mesh_of(fsdp)
    reserved = [_ANSWER, _ENDED, *([_IDS] if keep_ids else [])]

    def look() -> int:
        check_output(output, _SUFFIXES)
        return scan(Path(rows), required=["prompt"], reserved=reserved).rows

    total = distributed.by_first(look)
    with naming("model", "--"):
        folder = distributed.after_first(lambda: locate(model)).folder
        config = check_llama(folder)
        tokenizer = TargetTokenizer(local_files(folder))
    template = Template(how.template, tokenizer, how.system)
    stops = sorted({*stop_ids(folder), *(_stop_id(tokenizer, stop) for stop in how.stop)})
    num_rows = how.batch_rows * mesh.size
    room = config.max_positions - how.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max_new_tokens is {how.max_new_tokens}; the context of --model={model} has"
            f" {config.max_positions} tokens, prompt and answer together."
        )

    def all_windows() -> Iterator[Window]:
        def entry(line: int, cells: dict[str, Any]) -> _Prompt:
            return _prompt(line, cells, template, room)

        return in_windows(Path(rows), num_rows * _WINDOW_BATCHES, entry)

    def read_all() -> dict[str, Any]:
        with console.progress(total, "reading", unit="rows") as progress:
            return _look(all_windows(), progress.update)

    found = distributed.by_first(read_all)
    about = {**dataclasses.asdict(how), "model": check_model(str(folder)), "stop": stops}
    parts = Parts(parts_of(target), about | {"batch_rows": num_rows})

    def all_batches() -> Iterator[_Batch]:
        for _, batches in _batched(all_windows(), found["widths"], num_rows, how.seed):
            yield from batches

    sampler = Sampler(
        load_llama(folder, how.dtype, mesh=mesh, progress=console.progress_of_bytes("reading")),
        stop_ids=stops,
        sampling=how.sampling,
        max_new_tokens=how.max_new_tokens,
        num_rows=num_rows,
        mesh=mesh,
        dtype=how.dtype,
    )
    _answer(sampler, parts, all_batches, found["prompts"], console)
    if not distributed.is_first():
        return
    with console.progress(found["rows"], "writing", unit="rows") as progress:
        pairs = _batched(all_windows(), found["widths"], num_rows, how.seed)
        rejects = _write_out(
            target, pairs, parts, found["rows"], tokenizer, stops, keep_ids, progress.update
        )
    parts.remove()
    console.print(f"{target}: {found['rows'] - rejects} rows")
    if rejects:
        console.warn(f"rows without an answer: {rejects}; {rejects_of(target)} says why")


def slots(length: int) -> int:
    """Slots that a prompt of so many tokens fills: few numbers, none above it by half."""
    step = max(16, 2 ** ((length - 1).bit_length() - 2)) if length > 1 else 16
    return -(-length // step) * step


def chosen_widths(counts: Mapping[int, int], least: int) -> list[int]:
    """The numbers of slots that prompts are filled up to, ascending.

    counts: prompts by `slots`. Fewer than `least` prompts go with those of the next number, so that
    no batch is for a few.
    """
    chosen, waiting = [], 0
    for width in sorted(counts):
        waiting += counts[width]
        if waiting >= least or width == max(counts):
            chosen.append(width)
            waiting = 0
    return chosen


def row_key(seed: int, cells: Mapping[str, Any]) -> list[int]:
    """The random key of a row: two numbers of 32 bits."""
    told = json.dumps([seed, cells.get("id"), cells["prompt"]])
    return np.frombuffer(hashlib.sha256(told.encode()).digest(), "<u4")[:2].tolist()


def _stop_id(tokenizer: TargetTokenizer, token: str) -> int:
    if token not in tokenizer.vocabulary:
        raise ValueError(f"--stop names {token!r}, which is not one token of the LLM's vocabulary.")
    return tokenizer.vocabulary[token]


def _prompt(line: int, cells: dict[str, Any], template: Template, room: int) -> _Prompt:
    """A row, its problem where it cannot be answered. room: most tokens that a prompt may have."""
    ids = np.empty(0, np.int32)
    try:
        if "prompt" not in cells:
            raise ValueError("row: there is no prompt.")
        cells["prompt"] = cell_value(cells["prompt"], str, "prompt", "row")
        (ids,) = template([cells["prompt"]])
        if len(ids) > room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; beside the answer the context has room for"
                f" {room}."
            )
    except ValueError as error:
        return _Prompt(line, cells, str(error).removeprefix("row: ").rstrip("."), ids)
    return _Prompt(line, cells, "", ids)


def _prompts(window: Window) -> list[_Prompt]:
    """Those of a window's rows that can be answered."""
    return [entry for entry in window.entries if isinstance(entry, _Prompt) and not entry.problem]


def _look(all_windows: Iterable[Window], told: Callable[[int], None]) -> dict[str, Any]:
    """The numbers of rows and of those that can be answered, and the widths. ValueError where none
    can be."""
    counts: collections.Counter[int] = collections.Counter()
    rows, first = 0, ""
    for window in all_windows:
        counts.update(slots(len(prompt.ids)) for prompt in _prompts(window))
        bad = (f"line {e.line}: {e.problem}" for e in window.entries if e.problem)
        first = first or next(bad, "")
        rows += window.size
        told(rows)
    if not counts:
        raise ValueError(f"none of the {rows} rows can be answered; the first, {first}.")
    return {"rows": rows, "prompts": counts.total(), "widths": chosen_widths(counts, _FEWEST)}


def _batched(
    all_windows: Iterable[Window], widths: Sequence[int], num_rows: int, seed: int
) -> Iterator[tuple[Window, list[_Batch]]]:
    """Each window, and the batches that its rows are answered in: of like length, by width."""
    num_batches = 0
    for window in all_windows:
        prompts = _prompts(window)
        by_width: dict[int, list[int]] = {}
        for place in np.argsort([len(prompt.ids) for prompt in prompts], kind="stable").tolist():
            length = len(prompts[place].ids)
            width = next((width for width in widths if length <= width), slots(length))
            by_width.setdefault(width, []).append(place)
        batches = []
        for width, places in by_width.items():
            for begin in range(0, len(places), num_rows):
                chosen = places[begin : begin + num_rows]
                rows = [
                    {
                        "ids": prompts[i].ids.tolist(),
                        "key": row_key(seed, prompts[i].cells),
                        "slots": width,
                    }
                    for i in chosen
                ]
                batches.append(_Batch(num_batches, chosen, rows))
                num_batches += 1
        yield window, batches


def _answer(
    sampler: Sampler,
    parts: Parts,
    all_batches: Callable[[], Iterable[_Batch]],
    total: int,
    console: Console,
) -> None:
    """Have the tokens of each batch in `parts`: int32 [rows, T]. total: rows of all processes."""
    index, count = jax.process_index(), jax.process_count()
    what = "answering"
    if count > 1:
        what = f"answering, process 0 of {count}"
        total = sum(batch.size for batch in all_batches() if batch.place % count == index)
    done = 0
    with console.progress(total, what, unit="rows") as progress:
        progress.update(done)  # rates are counted from here

        def run(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
            begin = time.monotonic()

            def told(tokens: int) -> None:
                progress.update(done, **{"tokens/s": tokens / (time.monotonic() - begin)})

            ids = [np.array(row["ids"], np.int32) for row in rows]
            return sampler(ids, [row["key"] for row in rows], rows[0]["slots"], told)

        def finished(rows: int) -> None:
            nonlocal done
            done = rows
            progress.update(rows)

        parts.fill(all_batches(), run, finished)


def _write_out(
    target: Path,
    all_batched: Iterable[tuple[Window, list[_Batch]]],
    parts: Parts,
    total: int,
    tokenizer: TargetTokenizer,
    stops: Sequence[int],
    keep_ids: bool,
    told: Callable[[int], None],
) -> int:
    """Write OUTPUT and its rejects. Returns the number of rejects. ValueError as `new_answers`."""
    with new_answers(target, total) as out:
        for window, batches in all_batched:
            ids_of = {
                place: ids_T
                for batch in batches
                for place, ids_T in zip(batch.places, parts.read(batch), strict=True)
            }
            tokens = [ids_of[i] for i in range(len(ids_of))]
            is_ended = [bool(np.isin(ids_T, stops).any()) for ids_T in tokens]
            # What ends an answer is no part of its text.
            bodies = [ids_T[(ids_T >= 0) & ~np.isin(ids_T, stops)] for ids_T in tokens]
            answers = zip(tokens, is_ended, bodies, tokenizer.decode(bodies), strict=True)
            for entry in window.entries:
                if entry.problem:
                    out.reject(entry, entry.problem)
                    continue
                ids_T, ended, body, text = next(answers)
                if NO_NUMBER in ids_T:
                    out.reject(entry, "the model's logits for it are no numbers")
                    continue
                kept = {_IDS: body.tolist()} if keep_ids else {}
                out.file.write(json_line(entry.cells | {_ANSWER: text, _ENDED: ended} | kept))
                out.answered += 1
            told(out.rows)
    return out.rejected
