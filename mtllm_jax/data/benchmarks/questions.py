"""Benchmarks whose answer is a text: MGSM, MKQA, XL-Sum.

MGSM (Shi et al. 2022), 11 languages with English, 250 problems that are translations of each other,
test only: mgsm_<two letters>.tsv (in mgsm/ of google-research/url-nlp, at the top of
juletxara/mgsm on the hub), without a header and without quoting, the question and its result, which
may have commas between thousands.

MKQA (Longpre et al. 2021), 10,000 questions in 26 languages with English, without passages: one
JSON object a line in dataset/mkqa.jsonl.gz of github.com/apple/ml-mkqa, with "queries" and
"answers" by language. An answer has a "type", a "text" and "aliases". Read are the questions with
short answers: entity, date, number, number_with_unit, short_phrase and binary, of which the text is
"yes" or "no" in all languages. zh_hk, Hong Kong's, has no code of its own and is called yue_Hant.

XL-Sum (Hasan et al. 2021), BBC articles and their summaries in 45 languages with English, which are
no translations of each other: <language>_test.jsonl, as the archives in data/ of csebuetnlp/xlsum
on the hub unpack, with "id", "text" and "summary".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks.benchmark import rank
from mtllm_jax.data.benchmarks.codes import TWO_LETTER, XLSUM
from mtllm_jax.data.benchmarks.layouts import Row
from mtllm_jax.data.files import check_columns, read_rows
from mtllm_jax.languages import check_language

_MGSM = {code: TWO_LETTER[code] for code in "bn de en es fr ja ru sw te th zh".split()}
_MKQA = {
    **{two: TWO_LETTER[two] for two in "ar da de en es fr he it ja ko ms ru sv th tr vi".split()},
    "fi": "fin_Latn", "hu": "hun_Latn", "km": "khm_Khmr", "nl": "nld_Latn", "no": "nob_Latn",
    "pl": "pol_Latn", "pt": "por_Latn", "zh_cn": "zho_Hans", "zh_hk": "yue_Hant",
    "zh_tw": "zho_Hant",
}  # fmt: skip
_SHORT = ("entity", "date", "number", "number_with_unit", "short_phrase", "binary")


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


def read_mkqa(
    path: str | Path, languages: Sequence[str] = (), limit: int | None = None
) -> list[Row]:
    """Rows of "id", "language", "question", "lang", the language as MKQA calls it, and "label", a
    list of all answers that are right.

    languages, limit: as of `read_mgsm`. ValueError for a folder without the file, a language that
    it does not have, and a row without its queries or answers.
    """
    folder = Path(path)
    places = ("dataset/mkqa.jsonl.gz", "mkqa.jsonl.gz", "mkqa.jsonl")
    file = next((folder / place for place in places if (folder / place).is_file()), None)
    if file is None:
        raise ValueError(
            f"{folder} holds no {' or '.join(places)}: that is where MKQA, of"
            " github.com/apple/ml-mkqa, has its rows."
        )
    theirs = {code: lang for lang, code in _MKQA.items()}
    codes = wanted(languages, theirs, folder)
    rows = []
    for line, cells in formats.json_records(file):
        where = formats.at(file, line)
        check_columns(cells, ("example_id", "queries", "answers"), where)
        for code in codes:
            lang = theirs[code]
            question, answers = cells["queries"].get(lang), cells["answers"].get(lang)
            if not question or not answers:
                raise ValueError(f"{where}: there is no question or no answer in {lang!r}.")
            if not all(answer["type"] in _SHORT for answer in answers):
                continue
            texts = [t for a in answers for t in (a["text"], *a.get("aliases", ())) if t]
            rows.append(
                {"id": str(cells["example_id"]), "language": code, "question": question}
                | {"lang": lang, "label": list(dict.fromkeys(texts)) or [""]}
            )
    rows.sort(key=lambda row: row["language"])
    return few(rows, limit)


def read_xlsum(
    path: str | Path, languages: Sequence[str] = (), limit: int | None = None
) -> list[Row]:
    """Rows of "id", "language", "text" and "label", the summary.

    languages, limit: as of `read_mgsm`, but that languages have articles of their own. ValueError
    as `read_rows`, for a folder without the files, and for a language that is not there.
    """
    files = _files(
        Path(path),
        ("{}_test.jsonl",),
        XLSUM,
        "XL-Sum, csebuetnlp/xlsum on the hub, unpacked,",
        languages,
    )
    columns = {"id": str, "text": str, "label": str}
    rows = [
        row | {"language": code}
        for code, file in files.items()
        for row in read_rows(file, columns=columns, optional=(), names={"label": "summary"})
    ]
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
