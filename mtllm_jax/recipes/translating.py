"""What translates for the baselines that do: test rows into English, or training rows out of it."""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from flax import nnx

from mtllm_jax import distributed
from mtllm_jax.checkpoint import tree_hash
from mtllm_jax.config import MTLLM
from mtllm_jax.data.benchmarks import source_language
from mtllm_jax.data.tokenise import TranslationTokenizer, translation_tokenizer
from mtllm_jax.decode import translate
from mtllm_jax.example_flops import translation_flops
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.nllb import load_nllb
from mtllm_jax.metrics import Console
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.runfolder import changed_since, read_jsonl, write_jsonl
from mtllm_jax.tasks.task import Row, texts_in, with_texts

_WINDOW = 2048  # training rows whose translations are written together
_DIGESTS = "translator.json"  # beside them: what tells the model and its settings from others

# Texts, and the language of each → the texts in English.
Translate = Callable[[Sequence[str], Sequence[str]], list[str]]


@dataclasses.dataclass(frozen=True)
class Translator:
    """Texts and their languages → the texts in English, or in another language."""

    model: NLLB
    tokenizer: TranslationTokenizer
    config: MTLLM
    mesh: jax.sharding.Mesh

    def __call__(
        self, texts: Sequence[str], languages: Sequence[str], into: Sequence[str] | None = None
    ) -> list[str]:
        """into: the language of each translation; None: English."""
        limits, known = self.config.evaluation, self.tokenizer.languages
        targets = into and [source_language(code, known) for code in into]
        return translate(
            self.model,
            self.tokenizer,
            texts,
            [source_language(code, known) for code in languages],
            targets or self.config.english,
            max_length=limits.max_length,
            max_new_tokens=limits.max_new_tokens,
            num_beams=limits.num_beams,
            mesh=self.mesh,
            batch_size=limits.batch_rows,
        )

    def digests(self) -> dict[str, str]:
        """What its translations depend on."""
        limits = self.config.evaluation
        settings = (limits.max_length, limits.max_new_tokens, limits.num_beams)
        return {"weights": tree_hash(nnx.state(self.model)), "settings": repr(settings)}

    def flops(self, texts: Sequence[str], made: Sequence[str]) -> float:
        """Of these translations, by as many tokens as what was made of each text has."""
        limits = self.config.evaluation
        read = self.tokenizer.encode(texts, self.config.english, max_length=limits.max_length)
        said = self.tokenizer.encode_target(made, self.config.english)  # the language, and </s>
        sizes = collections.Counter(map(lambda x, y: (len(x), len(y) - 1), read, said))
        return sum(
            count * translation_flops(self.model, *size, limits.num_beams)
            for size, count in sizes.items()
        )


def translator(config: MTLLM, folder: str, mesh: jax.sharding.Mesh) -> Translator:
    """A folder's model, with what it takes to translate by it."""
    legacy = config.legacy_source_order
    tokenizer = translation_tokenizer(local_files(folder), legacy_source_order=legacy)
    # Its layers scanned whatever the config says: token by token that is the faster way.
    return Translator(load_nllb(folder, mesh=mesh), tokenizer, config, mesh)


def in_english(rows: Sequence[Row], english: str, translate: Translate) -> list[Row]:
    """The rows with translations in the place of texts that are not in English; one that is
    translated by nothing stays as it is."""
    foreign = [row for row in rows if row["language"] != english]
    texts = [(text, row["language"]) for row in foreign for text in texts_in(row)]
    made = translate([text for text, _ in texts], [code for _, code in texts])
    translated = (new if new.strip() else old for new, (old, _) in zip(made, texts, strict=True))
    return [
        row
        if row["language"] == english
        else with_texts(row, list(itertools.islice(translated, len(texts_in(row)))))
        for row in rows
    ]


def remembered(translate: Translate) -> Translate:
    """The same, which translates no text twice."""
    known: dict[tuple[str, str], str] = {}

    def translated(texts: Sequence[str], languages: Sequence[str]) -> list[str]:
        keys = list(zip(texts, languages, strict=True))
        if fresh := list(dict.fromkeys(key for key in keys if key not in known)):
            known.update(zip(fresh, translate(*zip(*fresh, strict=True)), strict=True))
        return [known[key] for key in keys]

    return translated


def drawn_languages(num: int, codes: Sequence[str], seed: int) -> list[str]:
    """The language that each of so many rows is translated into: one of `codes` [ours], so that
    training on translations costs what training on English does."""
    places = np.random.default_rng(seed).integers(len(codes), size=num)
    return [codes[i] for i in places]


def out_of_english(
    rows: Sequence[Row],
    languages: Sequence[str],
    translate: Callable[[], Translator],
    folder: epath.Path,
    console: Console,
) -> list[Row]:
    """The rows translated, each into its language; labels and ids stay, and texts that no
    translation comes of.

    translate: opens the model, where any row is left. folder: windows of rows are kept in it, so
    that another start goes on. ValueError if that is by another model, or into other languages.
    """
    made: list[Row] = []
    opened: Translator | None = None
    with console.progress(len(rows), "translating the training rows", unit="rows") as progress:
        for begin in range(0, len(rows), _WINDOW):
            path = folder / f"{begin // _WINDOW:05}.jsonl"
            window = slice(begin, begin + _WINDOW)
            if not distributed.by_first(path.exists):
                if opened is None:
                    opened = translate()
                    _check_same(folder, opened, languages)
                fresh = _translated(rows[window], languages[window], opened)
                if distributed.is_first():
                    write_jsonl(path, fresh)
                distributed.meet()
            made += read_jsonl(path)
            progress.update(len(made))
    return made


def _check_same(folder: epath.Path, opened: Translator, languages: Sequence[str]) -> None:
    """Raise ValueError unless windows that are there already were translated alike."""
    drawn = hashlib.sha256(" ".join(languages).encode()).hexdigest()
    digests = opened.digests() | {"languages": drawn}
    changed = distributed.by_first(lambda: changed_since(folder / _DIGESTS, digests, write=True))
    if changed:
        raise ValueError(
            f"the translator's {' and '.join(changed)} are not those that {folder} was begun with;"
            " put them back, or begin in another workdir."
        )


def _translated(rows: Sequence[Row], languages: Sequence[str], translate: Translator) -> list[Row]:
    texts = [text for row in rows for text in texts_in(row)]
    codes = [code for row, code in zip(rows, languages, strict=True) for _ in texts_in(row)]
    said = translate(texts, [row["language"] for row in rows for _ in texts_in(row)], codes)
    new = (one if one.strip() else old for one, old in zip(said, texts, strict=True))
    return [
        dict(with_texts(row, list(itertools.islice(new, len(texts_in(row)))))) | {"language": code}
        for row, code in zip(rows, languages, strict=True)
    ]
