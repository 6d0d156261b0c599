"""Benchmarks of the field, read from a clone of their repository or a folder of the hub's files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mtllm_jax.data.benchmarks.benchmark import Benchmark, Published, read_published
from mtllm_jax.data.benchmarks.bitext import BITEXTS, Bitext, read_bitext
from mtllm_jax.data.benchmarks.classification import NUSAX_SENTIMENT, SIB200
from mtllm_jax.data.benchmarks.codes import STAND_INS, source_language
from mtllm_jax.data.benchmarks.layouts import Kind, Row, Split
from mtllm_jax.data.benchmarks.multiple_choice import BELEBELE, KARDES_COPA, XCOPA
from mtllm_jax.data.benchmarks.nli import AMERICASNLI, KARDES_NLI, XNLI
from mtllm_jax.data.benchmarks.own import read_own
from mtllm_jax.languages import ENGLISH

__all__ = [
    "BENCHMARKS",
    "BITEXTS",
    "STAND_INS",
    "Benchmark",
    "Bitext",
    "Kind",
    "Row",
    "read_benchmark",
    "read_bitext",
    "read_own",
    "source_language",
]

BENCHMARKS: dict[str, Published] = {
    "sib200": SIB200,
    "nusax": NUSAX_SENTIMENT,
    "xnli": XNLI,
    "americasnli": AMERICASNLI,
    "kardes_nli": KARDES_NLI,
    "kardes_copa": KARDES_COPA,
    "belebele": BELEBELE,
    "xcopa": XCOPA,
}


def read_benchmark(
    name: str,
    path: str | Path,
    *,
    languages: Sequence[str] | Literal["all"] = "all",
    english: str = ENGLISH,
    english_data: str | Path | None = None,
    translations: str | Path | None = None,
    splits: Sequence[Split] = ("train", "dev", "test"),
    limit: int | None = None,
) -> Benchmark:
    """One of BENCHMARKS, from the folder of its files.

    languages: FLORES-200 codes that are tested beside English, or all that there are; English is
    tested where the benchmark has it. english: the language that is trained in. english_data: the
    folder of rows in it that the benchmark has not itself: MNLI or XNLI for "xnli", "americasnli"
    and "kardes_nli", COPA for "xcopa" and "kardes_copa", the assembled training set for "belebele".
    translations: the folder of published translations into English, of "sib200" or "americasnli".
    splits: what is read; others are empty. limit: test rows of a language, drawn by `sample`:
    labels keep their proportions, and languages that are translations of each other the same items.

    Blank texts of published pairs are kept and counted in the notes; elsewhere they are errors.
    Raises ValueError for an unknown name, a folder without the files, a language that is not there,
    rows of one id with different labels, a language without one of the labels, and as `read_rows`.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is not one of {', '.join(BENCHMARKS)}.")
    return read_published(
        name,
        BENCHMARKS[name],
        path,
        languages=languages,
        english=english,
        english_data=english_data,
        translations=translations,
        splits=splits,
        limit=limit,
    )
