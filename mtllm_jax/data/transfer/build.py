"""The transfer set: rows, translations, lexicons and a parallel corpus → what an LLM is trained on.

    manifest.json                      what it was made from and how; counts of what is in it and of
                                       what was dropped; versions and digests
    rows-00000-of-00003.arrayrecord …  examples as JSON, in an order that the seed draws
    dropped.jsonl                      rows that were left out, each with the reason
    sample.html                        some examples of each kind, to be read

An example is {id, kind, combination, prompt, answer, prompt_language, answer_language,
target, row, lexicon, replaced, model, translator}: what it says, and where it comes from. What is
drawn for it depends on its id and the seed alone, not on the rows beside it.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

import mtllm_jax
from mtllm_jax import distributed
from mtllm_jax.config import COMBINATIONS, TransferSet
from mtllm_jax.data.prepared import MANIFEST, Records, sha256, shard_name
from mtllm_jax.data.transfer.held_out import HeldOut
from mtllm_jax.data.transfer.lexicon import Lexicon, switch
from mtllm_jax.data.transfer.parallel import Pair, cut
from mtllm_jax.data.transfer.rows import AnswerFilter, Reject, Row
from mtllm_jax.languages import LANGUAGES, check_language
from mtllm_jax.runfolder import differing_fields, read_json, write_json, write_jsonl, write_text

FORMAT = "transfer-1"
_SHARD = 100_000  # examples
_SHOWN = 3  # examples of each kind, combination and target on the page
_MOST_SHOWN = 120

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a transfer set is made from.

    lexicons: by direction, (from, to). parallel: pairs by target. model, translator: what answers
    and translations were made by, for the examples' provenance. rejects: rows of files that could
    not be read.
    """

    rows: Sequence[Row] = ()
    lexicons: Mapping[tuple[str, str], Lexicon] = dataclasses.field(default_factory=dict)
    parallel: Mapping[str, Sequence[Pair]] = dataclasses.field(default_factory=dict)
    held_out: HeldOut = dataclasses.field(default_factory=HeldOut)
    answer_filter: AnswerFilter | None = None
    model: str = ""
    translator: str = ""
    rejects: Sequence[Reject] = ()


@dataclasses.dataclass
class Made:
    """examples: in the set's order. dropped: what was left out, with "kind" and "reason"."""

    examples: list[Example]
    dropped: list[dict[str, Any]]

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each kind."""
        return dict(sorted(collections.Counter(e["kind"] for e in self.examples).items()))

    @property
    def dropped_counts(self) -> dict[str, dict[str, int]]:
        """Of each reason and kind."""
        found: dict[str, collections.Counter[str]] = {}
        for entry in self.dropped:
            found.setdefault(entry["reason"], collections.Counter())[entry["kind"]] += 1
        return {reason: dict(sorted(kinds.items())) for reason, kinds in sorted(found.items())}


# ---------------------------------------------------------------- examples


def make(config: TransferSet, inputs: Inputs) -> Made:
    """All examples of a set. ValueError where what a kind needs is missing, or nothing is left."""
    config.check()
    _check_inputs(config, inputs)
    made = Made([], [])
    for reject in inputs.rejects:
        about = {"file": reject.file, "line": reject.line, "row": dict(reject.cells)}
        made.dropped.append({"kind": "row", "reason": reject.reason, **about})
    rows = _kept_answers(config, inputs, made)
    candidates = itertools.chain(_combined(config, inputs, rows, made), _parallel(config, inputs))
    for example, texts in candidates:
        # Texts of the resource-rich side too: a translation of a test item is one.
        if any(inputs.held_out.holds(text) for text in texts):
            made.dropped.append(_note(example, "held out for evaluation"))
            continue
        for copy in range(_times(config, example)):
            made.examples.append(example | {"id": f"{example['id']}#{copy}"} if copy else example)
    if not made.examples:
        raise ValueError(f"the transfer set is empty; dropped: {made.dropped_counts}.")
    made.examples.sort(key=lambda example: _digest(config, "order", example["id"]))
    return made


def _check_inputs(config: TransferSet, inputs: Inputs) -> None:
    weights = config.weights
    if any(weights[name] for name in (*COMBINATIONS, "switched")):
        if not inputs.rows:
            raise ValueError("there are no rows of instructions, which config.transfer asks for.")
        if not any(config.answers in row.texts for row in inputs.rows):
            raise ValueError(
                f"no row has a text {config.answers!r}, which config.transfer.answers names."
            )
    if (config.answer_filter == "none") != (inputs.answer_filter is None):
        given = "none was given" if inputs.answer_filter is None else "one was given"
        raise ValueError(f"config.transfer.answer_filter is {config.answer_filter!r}, and {given}.")
    for target in config.targets:
        if weights["switched"]:
            for pair in _directions(config, target):
                if pair not in inputs.lexicons:
                    raise ValueError(
                        f"config.transfer.switched is {weights['switched']}, and there is no"
                        f" lexicon of {pair[0]} and {pair[1]}."
                    )
                lexicon = inputs.lexicons[pair]
                if (lexicon.source, lexicon.target) != pair:
                    raise ValueError(
                        f"the lexicon {lexicon.name} is one of {lexicon.source} into"
                        f" {lexicon.target}; it must be of {pair[0]} into {pair[1]}."
                    )
        for kind in ("translation", "completion"):
            if weights[kind] and not inputs.parallel.get(target):
                raise ValueError(
                    f"config.transfer.{kind} is {weights[kind]}, and there are no parallel"
                    f" sentences in {target}."
                )
    for row in inputs.rows:
        for code in row.translations:
            check_language(code)


def _directions(config: TransferSet, target: str) -> list[tuple[str, str]]:
    """The lexicons that code-switching asks for."""
    sides = {"prompt": (0,), "answer": (1,), "both": (0, 1)}[config.switched_sides]
    letters = sorted({name[side] for name in config.switched_from for side in sides})
    both = {"L": (config.source, target), "T": (target, config.source)}
    return [both[letter] for letter in letters]


def _kept_answers(config: TransferSet, inputs: Inputs, made: Made) -> list[Row]:
    """The rows whose answers are there, and kept by the filter."""
    there = []
    for row in inputs.rows:
        needed = [config.answers, *(["reference"] if inputs.answer_filter else [])]
        missing = [name for name in needed if not row.texts.get(name, "").strip()]
        if missing:
            reason = f"there is no {missing[0]}"
            made.dropped.append({"kind": "row", "reason": reason, "row": row.id})
        else:
            there.append(row)
    if inputs.answer_filter is None or not there:
        return there
    answers = [row.texts["answer"] for row in there]
    keeps = inputs.answer_filter(answers, [row.texts["reference"] for row in there])
    for row, is_kept in zip(there, keeps, strict=True):
        if not is_kept:
            reason = f"answer filter: {config.answer_filter}"
            made.dropped.append({"kind": "row", "reason": reason, "row": row.id})
    return [row for row, is_kept in zip(there, keeps, strict=True) if is_kept]


Candidate = tuple[Example, tuple[str, ...]]  # and the texts that must not be held out


def _combined(
    config: TransferSet, inputs: Inputs, rows: Sequence[Row], made: Made
) -> Iterator[Candidate]:
    """Instructions and answers in their languages, and code-switched copies of them."""
    weights = config.weights
    kinds = [(name, name) for name in COMBINATIONS if weights[name] and name != "LL"]
    kinds += [("switched", name) for name in config.switched_from if weights["switched"]]
    for row in rows:
        own = row.texts["prompt"], row.texts[config.answers]
        if weights["LL"]:
            yield _pair_example(config, inputs, row, "LL", "LL", "", {"L": own}), own
        for target, (kind, name) in itertools.product(config.targets, kinds):
            translation = row.translations.get(target, {})
            made_of = translation.get("prompt", ""), translation.get(config.answers, "")
            texts = {"L": own, "T": made_of}
            example = _pair_example(config, inputs, row, kind, name, target, texts)
            said = example["prompt"], example["answer"]
            if not all(text.strip() for text in said):
                made.dropped.append(_note(example, "there is no translation"))
            elif kind == "switched" and not _switch(config, inputs, example):
                made.dropped.append(_note(example, "no word was replaced"))
            else:
                # What words were put in may be held out too.
                all_texts = (*own, *said, example["prompt"], example["answer"])
                if example["prompt_language"] != example["answer_language"]:
                    language = LANGUAGES[example["answer_language"]].name
                    prompt = example["prompt"]
                    example["prompt"] = config.crossed_prompt.format(
                        prompt=prompt, language=language
                    )
                yield example, all_texts


def _pair_example(
    config: TransferSet,
    inputs: Inputs,
    row: Row,
    kind: str,
    combination: str,
    target: str,
    texts: Mapping[str, tuple[str, str]],
) -> Example:
    codes = {"L": config.source, "T": target}
    name = kind if kind == combination else f"{kind}-{combination}"
    return {
        "id": "/".join(filter(None, (name, target, row.id))),
        "kind": kind,
        "combination": combination,
        "prompt": texts[combination[0]][0],
        "answer": texts[combination[1]][1],
        "prompt_language": codes[combination[0]],
        "answer_language": codes[combination[1]],
        "target": target,
        "row": row.id,
        "lexicon": "",
        "replaced": 0,
        "model": inputs.model,
        "translator": inputs.translator if "T" in combination else "",
    }


def _switch(config: TransferSet, inputs: Inputs, example: Example) -> bool:
    """Replace words of an example in place; whether there were any."""
    rng = np.random.default_rng(list(_digest(config, "switch", example["id"])))
    sides = ("prompt", "answer") if config.switched_sides == "both" else (config.switched_sides,)
    names = []
    for side in sides:
        code = example[f"{side}_language"]
        other = example["target"] if code == config.source else config.source
        lexicon = inputs.lexicons[code, other]
        example[side], replaced = switch(example[side], lexicon, config.switch_rate, rng)
        example["replaced"] += replaced
        names.append(lexicon.name)
    example["lexicon"] = ", ".join(dict.fromkeys(names))
    return example["replaced"] > 0


def _parallel(config: TransferSet, inputs: Inputs) -> Iterator[Candidate]:
    """Instructions to translate, both ways, and to go on."""
    for target in config.targets:
        pairs: Iterable[Pair] = inputs.parallel.get(target, ())
        if config.parallel_pairs:
            drawn = sorted(pairs, key=lambda pair: _digest(config, "pairs", f"{target}/{pair.id}"))
            pairs = drawn[: config.parallel_pairs]
        for pair in pairs:
            sides = {config.source: pair.source, target: pair.target}
            if config.translation:
                for codes in ((config.source, target), (target, config.source)):
                    names = [LANGUAGES[code].name for code in codes]
                    prompt = config.translation_prompt.format(
                        source=names[0], target=names[1], text=sides[codes[0]]
                    )
                    example = _parallel_example(config, "translation", codes, target, pair)
                    example |= {"prompt": prompt, "answer": sides[codes[1]]}
                    yield example, (pair.source, pair.target)
            if config.completion:
                codes = (config.source, target)
                example = _parallel_example(config, "completion", codes, target, pair)
                rng = np.random.default_rng(list(_digest(config, "cut", example["id"])))
                if place := cut(pair.target, target, config.prefix, rng):
                    given = pair.target[:place].rstrip()
                    prompt = config.completion_prompt.format(
                        target=LANGUAGES[target].name, text=given
                    )
                    example |= {"prompt": prompt, "answer": pair.target[place:].strip()}
                    yield example, (pair.source, pair.target)


def _parallel_example(
    config: TransferSet, kind: str, codes: tuple[str, str], target: str, pair: Pair
) -> Example:
    way = "" if kind == "completion" else "from" if codes[0] == target else "into"
    return {
        "id": "/".join(filter(None, (kind, way, target, pair.id))),
        "kind": kind,
        "combination": "",
        "prompt": "",
        "answer": "",
        "prompt_language": config.source,
        "answer_language": codes[1],
        "target": target,
        "row": pair.id,
        "lexicon": "",
        "replaced": 0,
        "model": "",
        "translator": "",
    }


def _note(example: Example, reason: str) -> dict[str, Any]:
    about = {name: example[name] for name in ("kind", "combination", "target", "row")}
    return {"reason": reason, **about}


def _times(config: TransferSet, example: Example) -> int:
    """How often an example is there: its kind's weight, what is behind the point by lot."""
    weight = config.weights[example["kind"]]
    whole = int(weight)
    drawn = int.from_bytes(_digest(config, "weight", example["id"])[:8]) / 2**64
    return whole + (drawn < weight - whole)


def _digest(config: TransferSet, what: str, name: str) -> bytes:
    """Bytes that are the same for the same seed, purpose and name."""
    return hashlib.sha256(f"{config.seed}/{what}/{name}".encode()).digest()


# ---------------------------------------------------------------- a folder


def build(folder: str | os.PathLike[str], config: TransferSet, inputs: Inputs) -> "Transfer":
    """Make a set and write it, whole or not at all; what is there already is opened.

    All processes of a job call it; the first makes it. ValueError as `make`, and for a folder that
    holds something else, or a set of other settings or rows.
    """
    path = Path(folder)

    def first() -> None:
        made_from = _made_from(config, inputs)
        if path.exists():
            if differences := differing_fields(_manifest(path)["made_from"], made_from):
                raise ValueError(
                    f"{path} holds another transfer set ({', '.join(differences[:3])}); choose"
                    " another folder, or remove it."
                )
            return
        made = make(config, inputs)
        unfinished = path.with_name(f".{path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            _write(unfinished, made, made_from)
            os.replace(unfinished, path)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}.") from None

    distributed.by_first(first)
    return Transfer(path)


def _made_from(config: TransferSet, inputs: Inputs) -> dict[str, Any]:
    """All that decides a set, inputs by their digests."""
    rows = [[row.id, dict(row.texts), dict(row.translations)] for row in inputs.rows]
    lexicons = {
        f"{source}-{target}": _told([lexicon.name, dict(lexicon.entries)])
        for (source, target), lexicon in inputs.lexicons.items()
    }
    parallel = {
        target: _told([dataclasses.astuple(pair) for pair in pairs])
        for target, pairs in inputs.parallel.items()
    }
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),  # as a file gives it back
        "rows": _told(rows),
        "lexicons": lexicons,
        "parallel": parallel,
        "held_out": inputs.held_out.digest(),
        "model": inputs.model,
        "translator": inputs.translator,
    }


def _told(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _write(folder: Path, made: Made, made_from: Mapping[str, Any]) -> None:
    records = [json.dumps(example, ensure_ascii=False).encode() for example in made.examples]
    count = -(-len(records) // _SHARD)
    shards = []
    for i in range(count):
        rows = records[len(records) * i // count : len(records) * (i + 1) // count]
        file = folder / shard_name(i, count)
        writer = ArrayRecordWriter(os.fspath(file), "group_size:1")
        for record in rows:
            writer.write(record)
        writer.close()
        about = {"rows": len(rows), "bytes": file.stat().st_size, "sha256": sha256(file)}
        shards.append(about)
    manifest = {
        "format": FORMAT,
        "made_from": made_from,
        "examples": len(records),
        "counts": made.counts,
        "targets": dict(sorted(collections.Counter(e["target"] for e in made.examples).items())),
        "dropped": made.dropped_counts,
        "digest": hashlib.sha256(b"\n".join(records)).hexdigest(),
        "shards": shards,
        "versions": {
            "mtllm_jax": mtllm_jax.__version__,
            **{name: importlib.metadata.version(name) for name in ("numpy", "array_record")},
        },
    }
    write_jsonl(epath.Path(folder / "dropped.jsonl"), made.dropped)
    write_text(epath.Path(folder / "sample.html"), sample_page(made, manifest))
    write_json(epath.Path(folder / MANIFEST), manifest)


def sample_page(made: Made, manifest: Mapping[str, Any]) -> str:
    """A page with the counts and some examples of each kind, the first of the set."""
    shown: dict[tuple[str, str, str], list[Example]] = {}
    for example in made.examples:
        key = example["kind"], example["combination"], example["target"]
        shown.setdefault(key, []).append(example)
    # Where not all have room, each kind has its first before any has its second.
    places = sorted((i, key) for key, found in shown.items() for i in range(len(found[:_SHOWN])))
    some = [shown[key][i] for key, i in sorted((key, i) for i, key in places[:_MOST_SHOWN])]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(mtllm_jax.__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("transfer.html.j2")
    config = manifest["made_from"]["config"]
    return template.render(manifest=manifest, examples=some, config=config, languages=LANGUAGES)


class Transfer(Sequence[Example]):
    """A set that lies in a folder, its examples read by random access."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """ValueError for a folder of none, or one whose files are not all there."""
        path = Path(folder)
        self.manifest = _manifest(path)
        shards = self.manifest["shards"]
        files = [path / shard_name(i, len(shards)) for i in range(len(shards))]
        for file, shard in zip(files, shards, strict=True):
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise ValueError(f"{file} is missing or cut off; remove {path} and make it again.")
        counts = [shard["rows"] for shard in shards]
        self._records = Records(list(zip(map(os.fspath, files), counts, strict=True)))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: Any) -> Any:
        return json.loads(self._records[i])


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    values = read_json(epath.Path(path)) if path.is_file() else None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{folder} holds no transfer set of format {FORMAT}.")
    return values
