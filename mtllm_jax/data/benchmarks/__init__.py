"""Benchmarks of the field, read from a clone of their repository or a folder of the hub's files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mtllm_jax.data.benchmarks.benchmark import Benchmark, Published, read_published
from mtllm_jax.data.benchmarks.classification import NUSAX_SENTIMENT, SIB200
from mtllm_jax.data.benchmarks.codes import STAND_INS, source_language
from mtllm_jax.data.benchmarks.layouts import Kind, Row, Split
from mtllm_jax.data.benchmarks.own import read_own
from mtllm_jax.languages import ENGLISH

__all__ = [
    "BENCHMARKS",
    "STAND_INS",
    "Benchmark",
    "Kind",
    "Row",
    "read_benchmark",
    "read_own",
    "source_language",
]

BENCHMARKS: dict[str, Published] = {
    "sib200": SIB200,
    "nusax": NUSAX_SENTIMENT,
}


def read_benchmark(
    name: str,
    path: str | Path,
    *,
    languages: Sequence[str] | Literal["all"] = "all",
    english: str = ENGLISH,
    english_path: str | Path | None = None,
    splits: Sequence[Split] = ("train", "dev", "test"),
    limit: int | None = None,
) -> Benchmark:
    """One of BENCHMARKS, from the folder of its files.

    languages: FLORES-200 codes that are tested beside English, or all that there are; English is
    tested where the benchmark has it. english: the language that is trained in. english_path: where
    train and dev rows in it lie if they are no part of the benchmark. splits: what is read; others
    are empty. limit: test rows of a language, drawn by `sample`: proportions of labels stay, and
    languages that are translations of each other keep the same items.

    Raises ValueError for an unknown name, a folder without the benchmark's files, a language that
    it does not have, and as `read_rows` does.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is not one of {', '.join(BENCHMARKS)}.")
    return read_published(
        name,
        BENCHMARKS[name],
        path,
        languages=languages,
        english=english,
        english_path=english_path,
        splits=splits,
        limit=limit,
    )
