"""What a user brings to SDRRL beside models: instructions, word lists, a parallel corpus.

What is held out is drawn by the rows' ids (or their documents') and `config.text_seed`, so that a
sentence is in all languages or in none.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from mtllm_jax.config import SDRRL, naming, require
from mtllm_jax.data import formats
from mtllm_jax.data.files import ROW_SUFFIXES, cell_value, check_columns
from mtllm_jax.data.transfer.held_out import read_texts
from mtllm_jax.data.transfer.lexicon import Lexicon, read_lexicon
from mtllm_jax.data.transfer.parallel import Pair, read_parallel
from mtllm_jax.data.transfer.rows import read_rows
from mtllm_jax.languages import check_language
from mtllm_jax.recipes.job import stage_seed
from mtllm_jax.recipes.transferring import Material, Row


def read_own(config: SDRRL) -> Material:
    """That which `config.own` names. ValueError, naming the field, for what cannot be used."""
    own = config.own
    with naming("own.prompts"):
        prompts, rejects = _read_prompts(config)
    tests: list[Row] = []
    if own.tests:
        with naming("own.tests"):
            tests = _read_tests(config)
    lexicons: dict[tuple[str, str], Lexicon] = {}
    if own.lexicons:
        with naming("own.lexicons"):
            for code in config.languages:
                for pair in ((config.english, code), (code, config.english)):
                    lexicons[pair] = read_lexicon(own.lexicons, *pair)
    parallel: dict[str, list[Pair]] = {}
    lines: list[Row] = []
    if own.parallel:
        parallel, lines = _read_parallel(config)
    with naming("own.evaluations"):
        evaluations = [text for place in own.evaluations for text in read_texts(place)]
    return Material(prompts, tests, lexicons, parallel, lines, rejects, evaluations)


def _read_prompts(config: SDRRL) -> tuple[list[Row], list[Row]]:
    """Instructions, with references if each has one, and the rows that cannot be used."""
    read, bad = read_rows(config.own.prompts, ())
    columns = ["prompt"]
    if all("reference" in row.texts for row in read):
        columns.append("reference")
    else:
        for name, settings in config.sets.items():
            if settings.answers != "answer" or settings.answer_filter != "none":
                raise ValueError(
                    f"not all rows have a reference, which {name} of config.systems learns from"
                )
    chosen = _drawn((row.id for row in read), config.train_instructions, config.text_seed)
    prompts: list[Row] = [
        {"id": row.id, **{name: row.texts[name] for name in columns}}
        for row in read
        if row.id in chosen
    ]
    return prompts, [dataclasses.asdict(reject) for reject in bad]


def _read_tests(config: SDRRL) -> list[Row]:
    """Held-out instructions, language by language."""
    path = Path(config.own.tests)
    formats.check_file(path, ROW_SUFFIXES)
    codes, columns = (config.english, *config.languages), ("id", "language", "prompt", "reference")
    found: dict[str, dict[str, Row]] = {code: {} for code in codes}
    for line, cells in formats.stream(path):
        at = formats.at(path, line)
        if not any(found.values()):
            check_columns(cells, columns, formats.header_at(path))
        filled = {name: "" if cells.get(name) is None else cells[name] for name in columns}
        row = {name: str(cell_value(filled[name], str, name, at)) for name in columns}
        with naming(at, ""):
            of_language = found[check_language(row["language"], codes)]
        if row["id"] in of_language:
            raise ValueError(f"{at}: the id {row['id']!r} was there before, in {row['language']}")
        of_language[row["id"]] = row
    for code in config.languages:
        if not found[code]:
            raise ValueError(f"{path} holds no rows in {code}")
    ids = dict.fromkeys(id_ for of_language in found.values() for id_ in of_language)
    chosen = _drawn(ids, config.test_instructions, config.text_seed)
    return [
        row for of_language in found.values() for row in of_language.values() if row["id"] in chosen
    ]


def _read_parallel(config: SDRRL) -> tuple[dict[str, list[Pair]], list[Row]]:
    """Pairs to be trained on, by target; and where there are no tests, sentences held out: id,
    document, language, text. What stands in one document with these is neither."""
    own = config.own
    training: dict[str, list[Pair]] = {}
    lines: dict[tuple[str, str], Row] = {}
    for code in config.languages:
        with naming("own.parallel_data"):
            pairs = read_parallel(own.parallel, own.parallel_data, config.english, code)
        held, near = set[str](), set[str]()
        if not own.tests:
            held, near = _held_out(pairs, own.held_out_pairs, config.text_seed)
            left = f"so few that some of the {len(pairs)} pairs of {code} are left to be trained on"
            require(len(near) < len(pairs), "own.held_out_pairs", own.held_out_pairs, left)
        training[code] = [pair for pair in pairs if pair.id not in near]
        for pair in pairs:
            if pair.id in held:
                row = {"id": pair.id, "document": pair.document or pair.id}
                for there, text in ((config.english, pair.source), (code, pair.target)):
                    lines[pair.id, there] = row | {"language": there, "text": text}
    return training, list(lines.values())


_OF_A_DOCUMENT = 5  # sentences that are held out: a document more tells more than its sixth


def _held_out(pairs: Sequence[Pair], count: int, seed: int) -> tuple[set[str], set[str]]:
    """Ids of so many, the first ones of documents that are drawn, and of all that stand in these
    documents: a sentence is likelier to who has read its neighbours."""
    documents: dict[str, list[str]] = {}
    for pair in pairs:
        documents.setdefault(pair.document or pair.id, []).append(pair.id)
    held: list[str] = []
    near: set[str] = set()
    for document in sorted(documents, key=lambda name: (stage_seed(seed, name), name)):
        if len(held) < count:
            held += documents[document][:_OF_A_DOCUMENT]
            near.update(documents[document])
    return set(held[:count]), near


def _drawn(ids: Iterable[str], count: int, seed: int) -> set[str]:
    """So many of them, whatever their order; 0 = all."""
    return set(sorted(ids, key=lambda id_: (stage_seed(seed, id_), id_))[: count or None])
