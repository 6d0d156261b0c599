"""Benchmarks whose answer is a text: MGSM.

MGSM (Shi et al. 2022), 11 languages with English, 250 problems that are translations of each other,
test only: mgsm_<two letters>.tsv (in mgsm/ of google-research/url-nlp, at the top of
juletxara/mgsm on the hub), without a header and without quoting, the question and its result, which
may have commas between thousands.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks.benchmark import rank
from mtllm_jax.data.benchmarks.codes import TWO_LETTER
from mtllm_jax.data.benchmarks.layouts import Row
from mtllm_jax.languages import check_language

_MGSM = {code: TWO_LETTER[code] for code in "bn de en es fr ja ru sw te th zh".split()}


def read_mgsm(
    path: str | Path, languages: Sequence[str] = (), limit: int | None = None
) -> list[Row]:
    """Rows of "id", "language", "question" and "label", the result.

    languages: FLORES-200 codes; () = all that there are. limit: rows of a language, the same
    problems in all. ValueError for a folder without the files, a language that is not there, and a
    line that is not a question and a result.
    """
    files = _files(
        Path(path),
        ("mgsm/mgsm_{}.tsv", "mgsm_{}.tsv"),
        _MGSM,
        "MGSM, of google-research/url-nlp or juletxara/mgsm on the hub",
        languages,
    )
    rows = []
    for code, file in files.items():
        for line, text in formats.lines(file):
            cells = [cell.strip() for cell in text.rstrip("\r\n").split("\t")]
            if len(cells) != 2 or not all(cells):
                raise ValueError(
                    f"{formats.at(file, line)}: there must be a question and its result, with a tab"
                    " between."
                )
            question, label = cells
            rows.append(
                {"id": str(line - 1), "language": code, "question": question, "label": label}
            )
    return few(rows, limit)


def few(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows of each language, in their order: of the lowest `rank`."""
    if limit is None:
        return list(rows)
    ids: dict[str, list[str]] = {}
    for row in rows:
        ids.setdefault(row["language"], []).append(row["id"])
    kept = {code: set(sorted(those, key=rank)[:limit]) for code, those in ids.items()}
    return [row for row in rows if row["id"] in kept[row["language"]]]


def _files(
    folder: Path,
    patterns: Sequence[str],
    codes: Mapping[str, str],
    what: str,
    languages: Sequence[str],
) -> dict[str, Path]:
    """The file of each language, by FLORES-200 code, in the first of the patterns that has any.

    codes: theirs → FLORES-200. languages: those that are wanted; () = all.
    """
    for pattern in patterns:
        found = {
            code: folder / pattern.format(theirs)
            for theirs, code in codes.items()
            if (folder / pattern.format(theirs)).is_file()
        }
        if found:
            return {code: found[code] for code in wanted(languages, found, folder)}
    places = " or ".join(pattern.format("<language>") for pattern in patterns)
    raise ValueError(f"{folder} holds no {places}: that is where {what} has its test rows.")


def wanted(languages: Sequence[str], there: Mapping[str, object], folder: Path) -> list[str]:
    """The codes asked for, or all there are, sorted. ValueError for one that is not there."""
    for code in languages:
        try:
            check_language(code, there)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}.") from None
    return sorted(languages or there)
