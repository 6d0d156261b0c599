"""Test rows in English: machine translations that are published as files.

AmericasNLI: fdschmidt93/trident-nllb-llm2vec has three of its languages as NLLB-200-distilled-600M
translated them, in Parquet without ids, in the order of the benchmark's files.

SIB-200: mozilla/firefox-translations-models has FLORES dev and devtest (there "test") of 40
languages as the same model translated them, one sentence a line, which may be blank. A row's id is
its line in dev followed by devtest. The model was told two-letter codes, which it does not know:
these are noisy translations, below what it can do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks.codes import AMERICAS_NLI, TWO_LETTER
from mtllm_jax.data.benchmarks.layouts import Layout, Row

BY_NLLB = "Translate-test reads published translations by NLLB-200-distilled-600M."
BY_NLLB_NOISY = (
    "Translate-test reads published translations by NLLB-200-distilled-600M, noisy ones: it was"
    " told codes that it does not know, so that they are below what it can do."
)

_NLI = Layout(
    "data/translations/nllb-200-distilled-600M/americas_nli/{language}_{split}.parquet",
    {"test": "test"},
    {"label": "label", "text": "premise", "text_pair": "hypothesis"},
    AMERICAS_NLI,
    values={"label": {"0": "entailment", "1": "neutral", "2": "contradiction"}},
    blank=("text", "text_pair"),
)
_FLORES = "evaluation/{}-en/flores-{}.nllb.en"
_FLORES_LINES = {"dev": 997, "test": 1012}


def americas_nli(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """rows: in the order of the benchmark's files. Those of languages that `folder` has."""
    for layout in (_NLI, replace(_NLI, pattern="{language}_{split}.parquet")):
        if files := layout.files(folder):
            break
    else:
        raise ValueError(f"{folder} holds no translations of AmericasNLI, {_NLI.shown}.")
    translated: list[Row] = []
    for code, originals in _by_language(rows).items():
        if ("test", code) not in files:
            continue
        english, _ = layout.read(files, "pair", (), "test", [code])
        if [row["label"] for row in english] != [row["label"] for row in originals]:
            raise ValueError(
                f"{files['test', code][0]}: its {len(english)} rows are not those of AmericasNLI's"
                f" {len(originals)} in {code}, for their labels are others."
            )
        for row, other in zip(originals, english, strict=True):
            translated.append(row | {"text": other["text"], "text_pair": other["text_pair"]})
    return translated


def flores(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """Rows of SIB-200 in languages that `folder` has."""
    files = {
        code: {split: folder / _FLORES.format(two, split) for split in _FLORES_LINES}
        for two, code in TWO_LETTER.items()
        if (folder / _FLORES.format(two, "dev")).parent.is_dir()
    }
    if not files:
        raise ValueError(
            f"{folder} holds no translations of FLORES, {_FLORES.format('<xx>', 'dev')}."
        )
    translated: list[Row] = []
    for code, originals in _by_language(rows).items():
        if code in files:
            lines = [line for split, path in files[code].items() for line in _lines(path, split)]
            translated += [row | {"text": lines[int(row["id"])]} for row in originals]
    return translated


def _by_language(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["language"], []).append(row)
    return found


def _lines(path: Path, split: str) -> list[str]:
    lines = [line.rstrip("\r\n") for _, line in formats.lines(path)]
    if len(lines) != _FLORES_LINES[split]:
        raise ValueError(f"{path} has {len(lines)} lines, it must have {_FLORES_LINES[split]}.")
    return lines
