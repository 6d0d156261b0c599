"""The embedded text as a tensorflow-datasets builder: ArrayRecord files, read by position.

    dataset = build_text(folder, languages=("deu_Latn", "jpn_Jpan"), seed=0)
    dataset["parallel"][0]    # {"text": "ケニア", "english": "Kenya", "language": "jpn_Jpan", …}

| split | rows | fields |
|---|---|---|
| parallel | X–English names and lists, for the MT model | text, english, language, kind |
| english | facts, lists and names, for the LLM | text, kind |
| adaptation | names, lists and facts, for stage 1 | text, kind |
| task_train | labelled English names and lists | all |
| dev_seen, test_seen | new pairs of names of `task_train` | all |
| dev_unseen, test_unseen | pairs of names that no labelled text has | all |

"all" is text, english, language, kind ("name", "list" or "fact"), label (place in REGIONS) and id,
which is the same for one item in all languages. Without TensorFlow.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import babel
import numpy as np
import tensorflow_datasets as tfds
from babel.core import get_cldr_version
from tensorflow_datasets.proto import tf_example_pb2

from mtllm_jax.config import TextSizes
from mtllm_jax.data.babel import DEV_AND_TEST, REGIONS, BabelText, Row, check_languages
from mtllm_jax.languages import ENGLISH

LABELLED = ("task_train", *DEV_AND_TEST)
SPLITS = ("parallel", "english", "adaptation", *LABELLED)

_EMPTY = {"text": "", "english": "", "language": ENGLISH, "kind": "", "label": -1, "id": -1}
_NUMBERS = ("label", "id")
_FIELDS = {split: tuple(_EMPTY) for split in LABELLED} | {
    "parallel": ("text", "english", "language", "kind"),
    "english": ("text", "kind"),
    "adaptation": ("text", "kind"),
}
_BATCH = 1024


class BabelConfig(tfds.core.BuilderConfig):
    """What the text depends on; the name, a folder of its own, is made of it."""

    def __init__(self, languages: Sequence[str], seed: int, sizes: TextSizes):
        self.languages, self.seed, self.sizes = tuple(languages), seed, sizes
        content = json.dumps([babel.__version__, self.languages, seed, dataclasses.asdict(sizes)])
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        name = f"seed{seed}-{len(self.languages)}languages-{digest}"
        super().__init__(name=name, description=f"CLDR names in {', '.join(self.languages)}")


class BabelNames(tfds.core.GeneratorBasedBuilder):
    """Names of territories and currencies in many languages, lists of them, and their region."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = dict.fromkeys(("text", "english", "language", "kind"), text)
        features |= {
            "label": tfds.features.ClassLabel(names=REGIONS),
            "id": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # the rows come shuffled, by our seed
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
        config = self.builder_config
        self._text = BabelText(config.languages, config.seed, config.sizes)
        self._rows = {split: self._text.rows(split) for split in SPLITS}
        self.info.metadata.update(
            cldr=get_cldr_version(),
            babel=babel.__version__,
            seed=config.seed,
            sizes=dataclasses.asdict(config.sizes),
            **self._text.describe(),
            rows={split: len(rows) for split, rows in self._rows.items()},
        )
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows: list[Row]) -> Iterator[tuple[int, Row]]:
        for i, row in enumerate(rows):
            yield i, _EMPTY | row


class Rows(Sequence[Row]):
    """Rows of one split by position: dicts of str and int. A source for grain; picklable.

    Takes the records as they lie in the file and reads them itself: eight times as fast as the
    library's general decoder, and workers that unpickle it build no builder.
    """

    def __init__(self, builder: BabelNames, split: str):
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw).data_source
        self._fields = _FIELDS[split]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Row:  # type: ignore[override]
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self._decode(self._records[int(i) % len(self)])

    def __getitems__(self, places: Sequence[int]) -> list[Row]:
        """Several rows at once, which is faster."""
        return [self._decode(record) for record in self._records.__getitems__(list(places))]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _BATCH):
            yield from self.__getitems__(range(start, min(start + _BATCH, len(self))))

    def _decode(self, record: bytes) -> Row:
        values = tf_example_pb2.Example.FromString(record).features.feature
        return {
            name: values[name].int64_list.value[0]
            if name in _NUMBERS
            else values[name].bytes_list.value[0].decode()
            for name in self._fields
        }


class TextDataset:
    """A prepared builder. `dataset[split]` are its `Rows`; `labels` names the classes."""

    labels = REGIONS
    splits = SPLITS

    def __init__(self, builder: BabelNames):
        self.languages: tuple[str, ...] = builder.builder_config.languages
        self._builder = builder

    def __getitem__(self, split: str) -> Rows:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it may be {', '.join(SPLITS)}")
        return Rows(self._builder, split)

    def describe(self) -> dict[str, Any]:
        """Versions, counts, and what settings were chosen on, for the run folder. JSON.

        cldr, babel, seed, sizes; languages, scripts; concepts, names, items, rows; and in English
        dev_unseen_concepts and dev_pairs, the concepts and pairs of the dev splits.
        """
        return json.loads(json.dumps(dict(self._builder.info.metadata)))


def build_text(
    folder: str | os.PathLike,
    *,
    languages: Sequence[str],
    seed: int,
    sizes: TextSizes | None = None,
) -> TextDataset:
    """Makes the text in `folder`, or opens it where it is already made. About 6 s, or none.

    languages: FLORES-200 codes beside English. The same languages (in the same order), seed and
    sizes give the same rows. Each combination has a sub-folder of its own, so nothing is ever
    overwritten, and one that was broken off is made again. ValueError for a language that CLDR
    does not have, naming the three nearest that it has.
    """
    config = BabelConfig(check_languages(languages), seed, sizes or TextSizes())
    with _silence():
        builder = BabelNames(data_dir=os.fspath(folder), config=config, file_format="array_record")
        builder.download_and_prepare()
    for empty in ("downloads/extracted", "downloads"):  # the library makes them unasked
        with contextlib.suppress(OSError):
            (Path(folder) / empty).rmdir()
    return TextDataset(builder)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """tensorflow-datasets without its bars, its log and its "Downloading and preparing"."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
