"""Instructions of the second recipe's embedded default: facts of CLDR, asked for in any language.

CLDR holds names and facts but no questions, so an instruction is a name and a mark that says what
is asked of it, "Japan <currency>", and its answer a name, "Japanese Yen"; in German "Japan
<currency>" and "Japanischer Yen". What an item asks is the same in all languages, and held out in
all of them. An *entity* is a territory or a language; other things may be asked of it in training.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from babel import Locale
from babel.core import get_global
from babel.languages import get_official_languages

from mtllm_jax.data.babel import currency_territories, names_of, territory_regions
from mtllm_jax.languages import ENGLISH, LANGUAGES

Row = dict[str, Any]

TASKS = ("region", "currency", "language", "script", "territory")
SPLITS = ("train", "dev", "test")

# Region → its number in UN M49, under which CLDR has its name.
_CONTINENTS = {"Africa": "002", "America": "019", "Asia": "142", "Europe": "150", "Oceania": "009"}
_MOST_LATIN = 40  # languages in the Latin script that the script is asked of
_HELD_OUT = 0.3  # of the items; a third of them for dev
# That a fact is in the LLM's text: in English as an instruction, and in each other language.
_TIMES, _TIMES_ELSEWHERE = 8, 2


@dataclass(frozen=True)
class Item:
    """task: of `TASKS`. entity, answer: keys of CLDR, as in `names`."""

    task: str
    entity: str
    answer: str

    @property
    def id(self) -> str:
        return f"{self.task}/{self.entity}"


@cache
def items() -> tuple[Item, ...]:
    """All that is asked: one answer each, and both sides have an English name."""
    english = names("en")
    found = [*_regions(), *_currencies(), *_languages(), *_scripts()]
    return tuple(item for item in found if item.entity in english and item.answer in english)


@cache
def names(locale: str) -> dict[str, str]:
    """Key → name in one CLDR locale, of whatever is asked about or answered.

    Those of `babel.names_of`, of continents ("continent/002") and of scripts ("script/Cyrl").
    """
    data = Locale.parse(locale)
    continents = {f"continent/{code}": data.territories.get(code) for code in _CONTINENTS.values()}
    scripts = {f"script/{code}": name for code, name in data.scripts.items()}
    return names_of(locale) | {key: name for key, name in (continents | scripts).items() if name}


def _regions() -> Iterator[Item]:
    for territory, region in territory_regions().items():
        yield Item("region", f"territory/{territory}", f"continent/{_CONTINENTS[region]}")


def _currencies() -> Iterator[Item]:
    """Territories with one currency that is legal tender today."""
    count = Counter(t for territories in currency_territories().values() for t in territories)
    for code, territories in currency_territories().items():
        for territory in sorted(territories):
            if count[territory] == 1:
                yield Item("currency", f"territory/{territory}", f"currency/{code}")


def _languages() -> Iterator[Item]:
    """Territories with one official language."""
    for territory in sorted(get_global("territory_languages")):
        official = get_official_languages(territory, de_facto=True)
        if len(official) == 1:
            yield Item("language", f"territory/{territory}", f"language/{official[0]}")


def _scripts() -> Iterator[Item]:
    """Languages with the script that they are mostly written in, of Latin's no more than a few, and
    the territory where most of their speakers are."""
    latin = 0
    likely = get_global("likely_subtags")
    for key in names_of("en"):
        kind, _, code = key.partition("/")
        if kind != "language" or code not in likely:
            continue
        _, script, territory = likely[code].split("_")[:3]
        latin += script == "Latn"
        if script != "Latn" or latin <= _MOST_LATIN:
            yield Item("script", key, f"script/{script}")
            yield Item("territory", key, f"territory/{territory}")


class Instructions:
    """The items of one seed by split, and as rows in any language. languages: FLORES-200 codes
    beside English."""

    def __init__(self, languages: Sequence[str], seed: int):
        self.languages, self.seed = tuple(languages), seed
        order = self._rng("items").permutation(len(items()))
        mixed = [items()[i] for i in order]
        held = round(len(mixed) * _HELD_OUT)
        dev = round(held / 3)
        self.items: Mapping[str, tuple[Item, ...]] = {
            "dev": tuple(mixed[:dev]),
            "test": tuple(mixed[dev:held]),
            "train": tuple(mixed[held:]),
        }

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])

    def rows(self, split: str, language: str) -> list[Row]:
        """The items of a split that have names in a language: id, language, prompt, reference."""
        known = names(_locale(language))
        return [
            {
                "id": item.id,
                "language": language,
                "prompt": f"{known[item.entity]} <{item.task}>",
                "reference": known[item.answer],
            }
            for item in self.items[split]
            if item.entity in known and item.answer in known
        ]

    def pairs(self, language: str) -> list[tuple[str, str]]:
        """(English name, name in the language) of all that is asked or answered, held out or not:
        what a dictionary has, without any instruction."""
        english, known = names("en"), names(_locale(language))
        keys = {key for item in items() for key in (item.entity, item.answer)}
        return [(english[key], known[key]) for key in sorted(keys) if key in known]

    def llm_texts(self) -> list[str]:
        """What the mini LLM is trained on, shuffled: every instruction in English with its answer,
        held out or not, some times over; in the other languages each name before its English one,
        and what is asked about before the answer, which says nothing of what was asked. No
        instruction in another language."""
        rows = [row for split in SPLITS for row in self.rows(split, ENGLISH)]
        texts = _TIMES * [f"{row['prompt']} {row['reference']}" for row in rows]
        for code in self.languages:
            known = names(_locale(code))
            texts += [f"{there} = {here}" for here, there in self.pairs(code)]
            texts += _TIMES_ELSEWHERE * [
                f"{known[item.entity]}, {known[item.answer]}"
                for item in items()
                if item.entity in known and item.answer in known
            ]
        return [texts[i] for i in self._rng("llm").permutation(len(texts))]


def _locale(code: str) -> str:
    return LANGUAGES[code].locale or code
