"""SIB-200 and NusaX: topics and sentiments of single texts.

SIB-200 (Adelani et al. 2024), 205 languages, rows parallel by index_id, which is the line of the
sentence in FLORES dev (0-996) or devtest (from 997). Quoted TSV; test files are sorted by label.
The repository has data/annotated/<code>/<split>.tsv, the hub data/<code>/<split>.tsv.

NusaX (Winata et al. 2023), 12 languages, rows parallel by id. CSV with line breaks in quoted
cells. Madurese, Ngaju and Toba Batak have no NLLB-200 code and are named by codes of that form.
"""

from mtllm_jax.data.benchmarks import translations
from mtllm_jax.data.benchmarks.benchmark import Published
from mtllm_jax.data.benchmarks.codes import NUSAX
from mtllm_jax.data.benchmarks.layouts import Layout

_SPLITS = {"train": "train", "dev": "dev", "test": "test"}
_SIB200 = {"id": "index_id", "label": "category", "text": "text"}

SIB200 = Published(
    kind="text",
    labels=(
        "entertainment",
        "geography",
        "health",
        "politics",
        "science/technology",
        "sports",
        "travel",
    ),
    layouts=(
        Layout("data/annotated/{language}/{split}.tsv", _SPLITS, _SIB200),
        Layout("data/{language}/{split}.tsv", _SPLITS, _SIB200),
    ),
    source="github.com/dadelani/sib-200 or Davlan/sib200 on the hub",
    licence="Apache-2.0; its sentences are FLORES-200, CC BY-SA 4.0",
    translate=translations.flores,
    translated_by=translations.BY_NLLB_NOISY,
)

NUSAX_SENTIMENT = Published(
    kind="text",
    labels=("negative", "neutral", "positive"),
    layouts=(
        Layout(
            "datasets/sentiment/{language}/{split}.csv",
            {"train": "train", "dev": "valid", "test": "test"},
            {"id": "id", "label": "label", "text": "text"},
            NUSAX,
        ),
    ),
    source="github.com/IndoNLP/nusax",
    licence="CC BY-SA 4.0",
)
