"""FLORES: the same sentences in some 200 languages, to measure translation on, and nothing else.

Belebele's passages are made of them, and SIB-200's rows are some of them: who trains on FLORES has
seen both. devtest, 1,012 lines, in three layouts:

FLORES-200 (NLLB Team 2022): devtest/<code>.devtest, a sentence a line.
FLORES+ (openlanguagedata/flores_plus on the hub): devtest/<code>.parquet with the columns id and
text; some codes are newer (cmn_Hans for zho_Hans), and languages that it has beyond those of
FLORES-200 keep theirs.
mozilla/firefox-translations-models: evaluation/<two letters>-en/flores-test.{<two letters>,en},
FLORES-101 in 40 languages.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks.benchmark import rank
from mtllm_jax.data.benchmarks.bitext import Bitext
from mtllm_jax.data.benchmarks.codes import TWO_LETTER
from mtllm_jax.data.benchmarks.questions import wanted
from mtllm_jax.data.files import read_rows
from mtllm_jax.languages import ENGLISH

_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_PLUS = {
    "cmn_Hans": "zho_Hans", "cmn_Hant": "zho_Hant", "fil_Latn": "tgl_Latn", "gug_Latn": "grn_Latn",
    "zgh_Tfng": "tzm_Tfng",
}  # fmt: skip


def read_flores(
    path: str | Path, languages: Sequence[str] = (), limit: int | None = None
) -> Bitext:
    """devtest, each language beside English.

    languages: FLORES-200 codes but English; () = all that there are. limit: sentences, the same in
    all languages. ValueError for a folder without the files, a language that is not there, and
    files of unequal length.
    """
    folder = Path(path)
    files = _files(folder)
    there = {code: pair for code, pair in files.items() if code != ENGLISH}
    if not there:
        raise ValueError(
            f"{folder} holds no devtest/<code>.devtest, devtest/<code>.parquet or"
            " evaluation/<xx>-en/flores-test.<xx>, with English: that is where FLORES-200, FLORES+"
            " and firefox-translations-models have FLORES."
        )
    pairs = {}
    for code in wanted(languages, there, folder):
        english, other = map(_sentences, there[code])
        if len(english) != len(other):
            raise ValueError(
                f"{there[code][1]} has {len(other)} sentences and English {len(english)}; they must"
                " be as many."
            )
        kept = sorted(sorted(range(len(english)), key=lambda i: rank(str(i)))[:limit])
        pairs[code] = [english[i] for i in kept], [other[i] for i in kept]
    return Bitext("flores", pairs, "CC BY-SA 4.0")


def _files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """By FLORES-200 code the file of English and that of the language."""
    for suffix in (".devtest", ".parquet"):
        english = folder / f"devtest/{ENGLISH}{suffix}"
        if english.is_file():
            return {
                _PLUS.get(file.stem, file.stem): (english, file)
                for file in sorted(english.parent.glob(f"*{suffix}"))
                if _CODE.fullmatch(file.stem)
            }
    place = "evaluation/{0}-en/flores-test.{1}"
    return {
        code: (folder / place.format(two, "en"), folder / place.format(two, two))
        for two, code in TWO_LETTER.items()
        if (folder / place.format(two, two)).is_file()
    }


def _sentences(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        rows = read_rows(file, columns={"id": str, "text": str}, optional=())
        return [row["text"].strip() for row in sorted(rows, key=lambda row: int(row["id"]))]
    sentences = []
    for line, text in formats.lines(file):
        if not text.strip():
            raise ValueError(f"{formats.at(file, line)}: the line is blank.")
        sentences.append(text.strip())
    return sentences
