"""XNLI, AmericasNLI and Kardeş-NLU: whether a premise entails or contradicts a hypothesis.

XNLI (Conneau et al. 2018), 15 languages, rows parallel by pairID. XNLI-1.0.zip has all languages
of a split in one tab-separated file without quoting, xnli.<split>.tsv; facebook/xnli on the hub a
folder a language, without ids, labels as numbers. English training rows are MNLI's: of
multinli_1.0.zip (JSON lines; "-" is the label of pairs that annotators did not agree on), of GLUE
(tab-separated without quoting, or the hub's Parquet), of nyu-mll/multi_nli, of XNLI-MT-1.0.zip
(which says "contradictory"), or those of facebook/xnli.

AmericasNLI (Ebrahimi et al. 2022), 10 languages, parts of XNLI by its ids; no English and no
training rows, so both come from the same places. The repository's anli.<split>.tsv repeat all
other files, and three rows of Nahuatl's test have a blank premise. Published scores are over all
rows, so those are kept.

Kardeş-NLU (Senel et al. 2024), five Turkic languages beside XNLI's English; CSV.
"""

from dataclasses import replace

from mtllm_jax.data.benchmarks import translations
from mtllm_jax.data.benchmarks.benchmark import Published
from mtllm_jax.data.benchmarks.codes import AMERICAS_NLI, KARDES_NLU, TWO_LETTER
from mtllm_jax.data.benchmarks.layouts import Layout
from mtllm_jax.languages import ENGLISH

_LABELS = ("contradiction", "entailment", "neutral")
_WORDS = {label: label for label in _LABELS}
_NUMBERS = {"0": "entailment", "1": "neutral", "2": "contradiction"}
_PAIR = ("text", "text_pair")

_HUB = Layout(
    "{language}/{split}-{part}.parquet",
    {"train": "train", "dev": "validation", "test": "test"},
    {"label": "label", "text": "premise", "text_pair": "hypothesis"},
    TWO_LETTER,
    values={"label": _NUMBERS},
    blank=_PAIR,
)
_XNLI = Layout(
    "xnli.{split}.tsv",
    {"dev": "dev", "test": "test"},
    {
        "id": "pairID",
        "language": "language",
        "label": "gold_label",
        "text": "sentence1",
        "text_pair": "sentence2",
    },
    {code: TWO_LETTER[code] for code in "ar bg de el en es fr hi ru sw th tr ur vi zh".split()},
    blank=_PAIR,
    quoting=False,
)
_MNLI = Layout(
    "multinli_1.0_{split}.jsonl",
    {"train": "train", "dev": "dev_matched"},
    {"label": "gold_label", "text": "sentence1", "text_pair": "sentence2"},
    language=ENGLISH,
    values={"label": {**_WORDS, "-": ""}},
    blank=_PAIR,
)
_MNLI_HUB = replace(
    _HUB,
    pattern="data/{split}-{part}.parquet",
    splits={"train": "train", "dev": "validation_matched"},
    languages=None,
    language=ENGLISH,
    values={"label": {**_NUMBERS, "-1": ""}},
)
_XNLI_MT = Layout(
    "multinli/multinli.{split}.en.tsv",
    {"train": "train"},
    {"label": "label", "text": "premise", "text_pair": "hypo"},
    language=ENGLISH,
    values={"label": {**_WORDS, "contradictory": "contradiction"}},
    blank=_PAIR,
    quoting=False,
)
_ENGLISH = (
    _MNLI,
    replace(_MNLI, pattern="multinli_1.0/multinli_1.0_{split}.jsonl"),
    replace(_MNLI, pattern="MNLI/{split}.tsv", quoting=False),
    _MNLI_HUB,
    replace(_MNLI_HUB, pattern="mnli/{split}-{part}.parquet"),
    _XNLI_MT,
    replace(_XNLI_MT, pattern="XNLI-MT-1.0/multinli/multinli.{split}.en.tsv"),
    replace(_HUB, splits={"train": "train", "dev": "validation"}),
    replace(_XNLI, splits={"dev": "dev"}),
    replace(_XNLI, pattern="XNLI-1.0/xnli.{split}.tsv", splits={"dev": "dev"}),
)
_ENGLISH_SOURCE = "MNLI or XNLI"

XNLI = Published(
    kind="pair",
    labels=_LABELS,
    layouts=(_XNLI, replace(_XNLI, pattern="XNLI-1.0/xnli.{split}.tsv"), _HUB),
    source="XNLI-1.0.zip or facebook/xnli on the hub",
    licence="XNLI: CC BY-NC 4.0; MNLI: OANC and others",
    english_layouts=_ENGLISH,
    english_source=_ENGLISH_SOURCE,
)

AMERICASNLI = Published(
    kind="pair",
    labels=_LABELS,
    layouts=(
        Layout(
            "data/anli_final/{split}/{language}.tsv",
            {"dev": "dev", "test": "test"},
            {"id": "id", "label": "label", "text": "premise", "text_pair": "hypothesis"},
            AMERICAS_NLI,
            blank=_PAIR,
            quoting=False,
        ),
        replace(_HUB, languages=AMERICAS_NLI),
    ),
    source="github.com/abteen/americasnli or nala-cub/americas_nli on the hub",
    licence="CC BY-SA 4.0",
    english_layouts=_ENGLISH,
    english_source=_ENGLISH_SOURCE,
    translate=translations.americas_nli,
    translated_by=translations.BY_NLLB,
)

_KARDES = Layout(
    "Data/*/xnli.{split}.{language}.csv",
    {"dev": "dev", "test": "test"},
    {"label": "gold_label", "text": "s1_translation", "text_pair": "s2_translation"},
    KARDES_NLU,
    blank=_PAIR,
)

KARDES_NLI = Published(
    kind="pair",
    labels=_LABELS,
    layouts=(_KARDES,),
    source="github.com/lksenel/Kardes-NLU",
    licence="not stated; translations of XNLI, CC BY-NC 4.0",
    english_layouts=(
        # English stands beside each translation.
        replace(
            _KARDES,
            pattern="Data/azeri/xnli.{split}.az.csv",
            names={"label": "gold_label", "text": "sentence1", "text_pair": "sentence2"},
            languages=None,
            language=ENGLISH,
        ),
        *_ENGLISH,
    ),
    english_source=_ENGLISH_SOURCE,
)
