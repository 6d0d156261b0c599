"""Text of the embedded default: names from CLDR, lists of them, and facts about them (ours).

A *concept* is a territory or a currency with a region, which is the label of the task. A *further*
name (other currencies, languages, territories without a region) has none and is there for variety.
An *item* is a pair of concepts of one region: written as a list in every language, it is one
example of the task. No item of a dev or test split stands, in either order, in a list of any
training text.
"""

import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, cycle, islice
from typing import Any

import numpy as np
from babel import Locale
from babel.core import get_global
from babel.lists import format_list

from mtllm_jax.config import TextSizes
from mtllm_jax.languages import ENGLISH, LANGUAGES, check_language

REGIONS = ("Africa", "America", "Asia", "Europe", "Oceania")
DEV_AND_TEST = ("dev_seen", "dev_unseen", "test_seen", "test_unseen")

_REGION_OF_ZONE = {region: region for region in REGIONS[:4]} | {
    "Pacific": "Oceania",
    "Australia": "Oceania",
}
_SEEN = 0.75  # of the concepts stand in labelled English text
_DEV = 1 / 3  # of the others are for choosing settings, the rest for the test
_FURTHER = 0.3  # of the other currencies and of the languages are given to the MT model
_NAMED_SINCE = 2024  # currencies of this year or later have no name yet in most languages
_NOTHING = ("ZZ", "XXX", "XTS", "mul", "und", "zxx")  # CLDR's words for "unknown" and the like
_MIN_SPEAKERS = 10.0  # per cent of a territory, for a fact about a language

Row = dict[str, Any]
Pair = tuple[str, str]


# ------------------------------------------------------------------ what CLDR knows


@cache
def territory_regions() -> dict[str, str]:
    """Territory → region: the most frequent of its time zones; without one if two are tied."""
    regions = {}
    for territory, zones in sorted(get_global("territory_zones").items()):
        areas = (zone.split("/")[0] for zone in zones)
        ranked = Counter(_REGION_OF_ZONE[a] for a in areas if a in _REGION_OF_ZONE).most_common()
        if ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]):
            regions[territory] = ranked[0][0]
    return regions


@cache
def currency_territories() -> dict[str, frozenset[str]]:
    """Currency → the territories in which it is legal tender today."""
    territories = defaultdict(set)
    for territory, currencies in get_global("territory_currencies").items():
        for code, _, end, tender in currencies:
            if end is None and tender:
                territories[code].add(territory)
    return {code: frozenset(ts) for code, ts in sorted(territories.items())}


@cache
def _new_currencies() -> frozenset[str]:
    starts = defaultdict(set)
    for currencies in get_global("territory_currencies").values():
        for code, start, _, _ in currencies:
            starts[code].add(start[0] if start else 0)
    return frozenset(code for code, years in starts.items() if min(years) >= _NAMED_SINCE)


@cache
def concept_regions() -> dict[str, str]:
    """Key of every labelled concept ("territory/KE", "currency/KES") → region."""
    regions = territory_regions()
    concepts = {f"territory/{territory}": region for territory, region in regions.items()}
    for code, territories in currency_territories().items():
        if code in _new_currencies():
            continue
        found = {regions.get(territory) for territory in territories}
        if len(found) == 1 and (region := found.pop()) is not None:
            concepts[f"currency/{code}"] = region
    return concepts


def _clean(name: str) -> str:
    """NFC, without the invisible direction marks that CLDR sets at the ends of some names."""
    name = unicodedata.normalize("NFC", name)
    invisible = {c for c in name if unicodedata.category(c) in ("Cf", "Zs")}
    return name.strip("".join(invisible))


@cache
def names_of(locale: str) -> dict[str, str]:
    """Key → name in one CLDR locale, of territories, currencies and languages.

    A name that means two concepts is left out for both, one that means a concept and something
    else keeps the concept alone. Former currencies, told apart by years, are left out.
    """
    data = Locale.parse(locale)
    tables = (
        ("territory", {k: v for k, v in data.territories.items() if len(k) == 2}),
        ("currency", data.currencies),
        ("language", {k: v for k, v in data.languages.items() if "_" not in k}),
    )
    names = {
        f"{kind}/{k}": _clean(v)
        for kind, table in tables
        for k, v in table.items()
        if v and k not in _NOTHING
    }
    meanings = defaultdict(set)
    for key, name in names.items():
        meanings[name.casefold()].add(key)

    def is_usable(key: str, name: str) -> bool:
        others = meanings[name.casefold()] - {key}
        rivals = others & concept_regions().keys() if key in concept_regions() else others
        return bool(name) and not rivals and not any(c.isdecimal() for c in name)

    return {key: name for key, name in sorted(names.items()) if is_usable(key, name)}


def are_related(a: str, b: str) -> bool:
    """Whether one of two concepts is a currency and the other a territory that uses it.

    Facts say such pairs in one sentence, so they are no items.
    """
    kinds = dict(key.split("/") for key in (a, b))
    if kinds.keys() != {"territory", "currency"}:
        return False
    return kinds["territory"] in currency_territories().get(kinds["currency"], ())


# ------------------------------------------------------------------ items


def draw_pairs(
    concepts: Iterable[str], count: int, taken: set[frozenset[str]], rng: np.random.Generator
) -> list[Pair]:
    """Up to `count` new pairs of one region each, in random order; adds them to `taken`.

    A region is drawn as often as its share of the concepts says, while it has pairs left.
    """
    regions = concept_regions()
    members = defaultdict(list)
    for key in sorted(concepts):
        members[regions[key]].append(key)
    pools = {}
    for region, keys in members.items():
        pool = [
            pair
            for pair in combinations(keys, 2)
            if frozenset(pair) not in taken and not are_related(*pair)
        ]
        pools[region] = [pool[i] for i in rng.permutation(len(pool))]
    pairs: list[Pair] = []
    while len(pairs) < count and (open_pools := [r for r in sorted(pools) if pools[r]]):
        weights = np.array([len(members[region]) for region in open_pools], float)
        region = open_pools[rng.choice(len(open_pools), p=weights / weights.sum())]
        a, b = pools[region].pop()
        taken.add(frozenset((a, b)))
        pairs.append((a, b) if rng.random() < 0.5 else (b, a))
    return pairs


class BabelText:
    """All text of one seed. `languages`: FLORES-200 codes beside English.

    Items depend on the seed and the sizes, not on the languages: another language adds rows to the
    splits and changes no other. A language in which a concept has no name, or a name of two
    meanings, lacks the items of that concept.
    """

    def __init__(self, languages: Sequence[str], seed: int, sizes: TextSizes):
        self.languages, self.seed, self.sizes = tuple(languages), seed, sizes
        english = names_of("en")
        self.regions = {k: r for k, r in concept_regions().items() if k in english}
        self.further = self._draw_further(english)
        keys = self.regions.keys() | self.further
        self.names = {
            code: {k: v for k, v in names_of(_locale(code)).items() if k in keys}
            for code in (ENGLISH, *self.languages)
        }
        self.concepts = self._split_concepts()
        self.items = self._draw_items()
        self._hidden = {code: self._hidden_lists(code) for code in self.names}

    def _rng(self, purpose: str) -> np.random.Generator:
        # One stream per purpose: the size of one split does not change another.
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])

    def _draw_further(self, english: Mapping[str, str]) -> set[str]:
        others = [k for k in english if k not in concept_regions()]
        rng = self._rng("further")
        return {k for k in others if k.startswith("territory/") or rng.random() < _FURTHER}

    def _split_concepts(self) -> dict[str, tuple[str, ...]]:
        """Concepts by part: seen, dev_unseen, test_unseen; stratified by region, disjoint."""
        parts: dict[str, list[str]] = {"seen": [], "dev_unseen": [], "test_unseen": []}
        rng = self._rng("concepts")
        for region in REGIONS:
            keys = sorted(k for k, r in self.regions.items() if r == region)
            keys = [keys[i] for i in rng.permutation(len(keys))]
            seen = round(len(keys) * _SEEN)
            dev = seen + round((len(keys) - seen) * _DEV)
            parts["seen"] += keys[:seen]
            parts["dev_unseen"] += keys[seen:dev]
            parts["test_unseen"] += keys[dev:]
        return {part: tuple(sorted(keys)) for part, keys in parts.items()}

    def _draw_items(self) -> dict[str, list[Pair]]:
        """Pairs of concepts by split: the four of dev and test, and `train`."""
        taken: set[frozenset[str]] = set()
        wanted = (
            ("test_seen", "seen", self.sizes.test_pairs),
            ("dev_seen", "seen", self.sizes.dev_pairs),
            ("test_unseen", "test_unseen", self.sizes.test_pairs),
            ("dev_unseen", "dev_unseen", self.sizes.dev_pairs),
            ("train", "seen", self.sizes.train_pairs),
        )
        return {
            split: draw_pairs(self.concepts[part], count, taken, self._rng(split))
            for split, part, count in wanted
        }

    def _hidden_lists(self, code: str) -> set[frozenset[str]]:
        """Pairs of names, as written in this language, that no training list may contain."""
        names = self.names[code]
        pairs = (pair for split in DEV_AND_TEST for pair in self.items[split])
        return {frozenset((names[a], names[b])) for a, b in pairs if a in names and b in names}

    # -------------------------------------------------------------- lists and facts

    def listed(self, code: str, keys: Sequence[str]) -> str:
        """Names joined by the language's own pattern: "Japan and Kenya", 「日本、ケニア」."""
        names = [self.names[code][key] for key in keys]
        return names[0] if len(names) == 1 else format_list(names, locale=_parsed(_locale(code)))

    def _is_hidden(self, code: str, keys: Sequence[str]) -> bool:
        names = self.names[code]
        return any(
            frozenset((names[a], names[b])) in self._hidden[code] for a, b in combinations(keys, 2)
        )

    def _draw_lists(
        self, code: str, pools: Sequence[Sequence[str]], count: int, rng: np.random.Generator
    ) -> Iterator[list[str]]:
        """`count` lists of two or three keys, each from one pool, that hold no dev or test item."""
        while count:
            pool = pools[int(rng.integers(len(pools)))]
            chosen = [pool[i] for i in rng.choice(len(pool), rng.integers(2, 4), replace=False)]
            if not (self._is_hidden(code, chosen) or self._is_hidden(ENGLISH, chosen)):
                yield chosen
                count -= 1

    def _simple_facts(self) -> list[str]:
        """All sentences about one concept, or about a territory and its money or languages."""
        names = names_of("en")
        facts = []
        for key, region in self.regions.items():
            name = self.names[ENGLISH][key]
            verbs = ("is", "lies", "is a place") if key.startswith("t") else ("is used", "is money")
            facts += [f"{name} {verb} in {region}" for verb in verbs]
        for code, territories in currency_territories().items():
            for territory in sorted(territories):
                money, place = names.get(f"currency/{code}"), names.get(f"territory/{territory}")
                if money and place:
                    facts += [
                        f"{money} is the currency of {place}",
                        f"People in {place} pay with {money}",
                    ]
        for territory, languages in sorted(get_global("territory_languages").items()):
            for code, use in sorted(languages.items()):
                speech, place = names.get(f"language/{code}"), names.get(f"territory/{territory}")
                if speech and place and use["population_percent"] >= _MIN_SPEAKERS:
                    facts += [f"{speech} is spoken in {place}", f"People in {place} speak {speech}"]
        return facts

    def _facts(self, count: int, rng: np.random.Generator) -> Iterator[str]:
        """Three simple facts to two about a list: "Kenya, Ghana, and Togo are in Africa"."""
        simple = self._simple_facts()
        num_simple = round(count * 0.6)
        yield from islice(cycle(_shuffled(simple, rng)), num_simple)
        pools = [sorted(k for k, r in self.regions.items() if r == region) for region in REGIONS]
        for keys in self._draw_lists(ENGLISH, pools, count - num_simple, rng):
            verb = ("are", "lie", "are found")[rng.integers(3)]
            yield f"{self.listed(ENGLISH, keys)} {verb} in {self.regions[keys[0]]}"

    # -------------------------------------------------------------- rows

    def rows(self, split: str) -> list[Row]:
        """The rows of a split; training text shuffled, dev and test by language and item."""
        if split in DEV_AND_TEST:
            return list(self._labelled(self.items[split], (ENGLISH, *self.languages)))
        makers: dict[str, Callable[[np.random.Generator], Iterator[Row]]] = {
            "parallel": self._parallel,
            "english": lambda rng: self._english(self.sizes.english, (0.2, 0.3, 0.5), rng),
            "adaptation": lambda rng: self._english(self.sizes.adaptation, (0.15, 0.65, 0.2), rng),
            "task_train": self._task_train,
        }
        rng = self._rng(f"rows of {split}")
        rows = _shuffled(list(makers[split](rng)), rng)
        if split == "task_train":
            return [row | {"id": i} for i, row in enumerate(rows)]
        return rows

    def _parallel(self, rng: np.random.Generator) -> Iterator[Row]:
        for code in self.languages:
            keys = sorted(self.names[code].keys() & self.names[ENGLISH].keys())
            rows = [([key], "name") for key in keys]
            lists = self._draw_lists(code, [keys], self.sizes.lists_per_language, rng)
            for chosen, kind in (*rows, *((chosen, "list") for chosen in lists)):
                text, english = self.listed(code, chosen), self.listed(ENGLISH, chosen)
                yield {"text": text, "english": english, "language": code, "kind": kind}

    def _english(
        self, count: int, shares: tuple[float, float, float], rng: np.random.Generator
    ) -> Iterator[Row]:
        """`count` rows, by shares of names, mixed lists and facts."""
        keys = sorted(self.names[ENGLISH])
        num_names, num_lists = (round(count * share) for share in shares[:2])
        for key in islice(cycle(_shuffled(keys, rng)), num_names):
            yield {"text": self.names[ENGLISH][key], "kind": "name"}
        for chosen in self._draw_lists(ENGLISH, [keys], num_lists, rng):
            yield {"text": self.listed(ENGLISH, chosen), "kind": "list"}
        for fact in self._facts(count - num_names - num_lists, rng):
            yield {"text": fact, "kind": "fact"}

    def _task_train(self, rng: np.random.Generator) -> Iterator[Row]:
        singles = [(key,) for key in self.concepts["seen"]]
        yield from self._labelled([*singles, *self.items["train"]], (ENGLISH,))

    def _labelled(self, items: Sequence[tuple[str, ...]], codes: Sequence[str]) -> Iterator[Row]:
        for code in codes:
            for i, keys in enumerate(items):
                if all(key in self.names[code] for key in keys):
                    yield {
                        "text": self.listed(code, keys),
                        "english": self.listed(ENGLISH, keys),
                        "language": code,
                        "kind": "name" if len(keys) == 1 else "list",
                        "label": REGIONS.index(self.regions[keys[0]]),
                        "id": i,
                    }

    # -------------------------------------------------------------- what to report

    def describe(self) -> dict[str, Any]:
        """Counts, and the concepts and pairs (in English) that settings may be chosen on."""
        english = self.names[ENGLISH]
        dev = {
            split: [[english[a], english[b]] for a, b in self.items[split]]
            for split in DEV_AND_TEST[:2]
        }
        return {
            "languages": {code: LANGUAGES[code].name for code in self.languages},
            "scripts": sorted({LANGUAGES[code].script for code in self.languages}),
            "concepts": len(self.regions),
            "concepts_of_region": dict(Counter(self.regions[k] for k in sorted(self.regions))),
            "concepts_of_part": {part: len(keys) for part, keys in self.concepts.items()},
            "names": len(english),
            "parallel_names": sum(len(self.names[code]) for code in self.languages),
            "items": {split: len(pairs) for split, pairs in self.items.items()},
            "named_concepts": {
                code: len(self.names[code].keys() & self.regions.keys()) for code in self.languages
            },
            "dev_unseen_concepts": sorted(english[k] for k in self.concepts["dev_unseen"]),
            "dev_pairs": dev,
        }


def check_languages(languages: Sequence[str]) -> tuple[str, ...]:
    """The languages, if text can be made in all of them; ValueError naming the first otherwise."""
    allowed = [code for code, x in LANGUAGES.items() if x.locale and code != ENGLISH]
    if not languages or len(set(languages)) < len(languages):
        raise ValueError(f"languages is {list(languages)}; it must name one or more, each once")
    return tuple(check_language(code, allowed) for code in languages)


def _locale(code: str) -> str:
    return LANGUAGES[code].locale or code


@cache
def _parsed(locale: str) -> Locale:
    return Locale.parse(locale)


def _shuffled(rows: list[Any], rng: np.random.Generator) -> list[Any]:
    return [rows[i] for i in rng.permutation(len(rows))]
