"""Belebele, XCOPA with COPA, and the COPA of Kardeş-NLU.

Belebele (Bandarkar et al. 2024), 122 languages, rows parallel by link and question_number: one JSON
object a line in <code>.jsonl (in data/ on the hub), the right answer's number from 1 in
correct_answer_num. It is a test. The English training set is what its repository's
assemble_training_set.py writes, belebele_training_set.tsv: quoted, with line breaks in cells, the
split in a column.

XCOPA (Ponti et al. 2020), 11 languages: rows are COPA's, `idx` the row of COPA's file of the same
split. Its field `question` is wrong in some languages (Thai says "effect" in all 600 rows), so what
is asked comes from COPA, which is read from the folder english_data: CSV with the header
premise,question,choice1,choice2,label. `question` is "cause" or "effect"; the model is asked in
COPA's own words, in English for all languages.

Kardeş-NLU (Senel et al. 2024): COPA in five Turkic languages beside English, CSV.
"""

from collections.abc import Sequence
from dataclasses import replace

from mtllm_jax.data.benchmarks.benchmark import Published
from mtllm_jax.data.benchmarks.codes import KARDES_NLU, TWO_LETTER
from mtllm_jax.data.benchmarks.layouts import Layout, Row
from mtllm_jax.languages import ENGLISH

_FOUR = ("1", "2", "3", "4")
_QUESTIONS = {
    "cause": "What was the cause of this?",
    "effect": "What happened as a result?",
}
_ANSWER = {
    "context": "flores_passage",
    "question": "question",
    "choices": tuple(f"mc_answer{i}" for i in _FOUR),
    "label": "correct_answer_num",
}
_BELEBELE = Layout(
    "{language}.jsonl", {"test": "test"}, {"id": ("link", "question_number"), **_ANSWER}
)

BELEBELE = Published(
    kind="choice",
    labels=_FOUR,
    layouts=(
        _BELEBELE,
        replace(_BELEBELE, pattern="Belebele/{language}.jsonl"),
        replace(_BELEBELE, pattern="data/{language}.jsonl"),
    ),
    source="Belebele.zip or facebook/belebele on the hub",
    licence="CC BY-SA 4.0; training set CC BY-NC",
    english_layouts=(
        Layout(
            "belebele_training_set.tsv",
            {"train": "train", "dev": "dev"},
            {
                "split": "split",
                "context": "passage",
                "question": "question",
                "choices": tuple(f"answer{i}" for i in _FOUR),
                "label": "correct_answer_num",
            },
            language=ENGLISH,
            # A whole number where pandas had blanks in the column is written with a point.
            values={"label": {"": "", **{f"{n}{end}": n for n in _FOUR for end in ("", ".0")}}},
            blank=("context", "question", "choices", "label"),
            keep_blank=False,
        ),
    ),
    english_source="assemble_training_set.py of github.com/facebookresearch/belebele",
    parallel=False,  # as it should be, but not seen here
)

_COPA = Layout(
    "data/copa/en_{split}.csv",
    {"train": "train", "dev": "dev", "test": "test"},
    {
        "context": "premise",
        "question": "question",
        "choices": ("choice1", "choice2"),
        "label": "label",
    },
    language=ENGLISH,
    values={"label": {"0": "1", "1": "2"}, "question": _QUESTIONS},
)


def ask_as_copa(rows: Sequence[Row], english: Sequence[Row]) -> list[Row]:
    """The rows with the question of the English one of the same id."""
    questions = {row["id"]: row["question"] for row in english}
    for row in rows:
        if row["id"] not in questions:
            raise ValueError(
                f"row {row['id']!r} of XCOPA in {row['language']} has no row of COPA: that has"
                f" {len(english)} rows."
            )
    return [row | {"question": questions[row["id"]]} for row in rows]


XCOPA = Published(
    kind="choice",
    labels=("1", "2"),
    layouts=(
        replace(
            _COPA,
            pattern="data/*/{split}.{language}.jsonl",
            splits={"dev": "val", "test": "test"},
            names={"id": "idx", **_COPA.names},
            languages=TWO_LETTER,
            language="",
        ),
        replace(
            _COPA,
            pattern="{language}/{split}-{part}.parquet",
            splits={"dev": "validation", "test": "test"},
            names={"id": "idx", **_COPA.names},
            languages=TWO_LETTER,
            language="",
        ),
    ),
    source="github.com/cambridgeltl/xcopa or cambridgeltl/xcopa on the hub",
    licence="CC BY 4.0; COPA: BSD 2-clause",
    english_layouts=(_COPA,),
    english_source="COPA",
    amend=ask_as_copa,
    notes=("What is asked is COPA's question: XCOPA's files have another one in some rows.",),
)

_KARDES = Layout(
    "Data/*/xcopa.{split}.{language}.csv",
    {"dev": "dev", "test": "test"},
    {
        "id": "id",
        "context": "p_translation",
        "question": "asks-for",
        "choices": ("a1_translation", "a2_translation"),
        "label": "most-plausible-alternative",
    },
    KARDES_NLU,
    values={"question": _QUESTIONS},
)

KARDES_COPA = Published(
    kind="choice",
    labels=("1", "2"),
    layouts=(_KARDES,),
    source="github.com/lksenel/Kardes-NLU",
    licence="not stated; translations of COPA, BSD 2-clause",
    english_layouts=(
        # English stands beside each translation.
        replace(
            _KARDES,
            pattern="Data/azeri/xcopa.{split}.az.csv",
            names={**_KARDES.names, "context": "p", "choices": ("a1", "a2")},
            languages=None,
            language=ENGLISH,
        ),
        _COPA,
    ),
    english_source="COPA",
    parallel=False,  # as it should be, but not seen here
)
