"""Which translations are kept: for each that is not, one word says why.

Lengths and letters are as `identify.num_letters` counts them, so that languages compare. The bounds
are ours: of 31,460 pairs of NTREX-128 in 110 languages, fewer than 1 in 1,000 lie outside of each.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mtllm_jax.data import identify

REASONS: Mapping[str, str] = {
    "long": "a sentence has more tokens than the translator reads",
    "empty": "nothing came back for a sentence",
    "length": "too short or too long for its source",
    "repetition": "says the same four times on end",
    "copy": "most of it is words of the source",
    "language": "in another language",
    "untranslatable": "the task is about the letters, words or grammar of its language, or code",
}
_LEAST_LETTERS = 20  # of a source whose translation's length and copied words are looked at
_WORD = re.compile(r"[^\W\d_]+")
_AGAIN = re.compile(r"(\S.{0,60}?)\1{3,}", re.DOTALL)
_LEAST_REPEATED = 12  # letters: shorter ones are laughter and lists


@dataclass(frozen=True)
class Filters:
    """What a translation may be."""

    least_length: float = 0.3  # [ours] letters of it, over those of its source
    most_length: float = 3.0  # [ours]
    most_copied: float = 0.8  # [ours] share of its letters in words of the source; 1 = all
    language: bool = True  # [ours] whether its language is looked at, where it can be told
    tasks: bool = True  # [ours] whether tasks that a translation spoils are left out

    def check(self) -> None:
        """Raise ValueError for what cannot be."""
        for name, is_good, allowed in (
            ("least_length", 0 <= self.least_length < 1, "from 0 to below 1"),
            ("most_length", self.most_length >= 1, "at least 1"),
            ("most_copied", 0 < self.most_copied <= 1, "above 0 and at most 1"),
        ):
            if not is_good:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be {allowed}.")


def reason_against(
    source: str, translation: str, language: str, filters: Filters
) -> tuple[str, bool]:
    """One of REASONS or "", and whether the language was told.

    source, translation: what was translated, without what had to stay.
    """
    letters, made = identify.num_letters(source), identify.num_letters(translation)
    if not letters:
        return "", False
    if not translation.strip():
        return "empty", False
    if letters >= _LEAST_LETTERS:
        if not filters.least_length <= made / letters <= filters.most_length:
            return "length", False
        if _copied(source, translation) > filters.most_copied:
            return "copy", False
    if repeats(translation) and not repeats(source):
        return "repetition", False
    told = identify.is_in(translation, language) if filters.language else None
    return "language" if told is False else "", told is not None


def repeats(text: str) -> bool:
    """Whether something stands four times on end, and is more than laughter or a short list."""
    again = _AGAIN.finditer(text + " ")  # the last of several words has no blank behind it
    return any(identify.num_letters(match[0]) >= _LEAST_REPEATED for match in again)


def _copied(source: str, translation: str) -> float:
    known = set(_WORD.findall(source.casefold()))
    words = _WORD.findall(translation.casefold())
    letters = sum(map(identify.num_letters, words))
    return sum(identify.num_letters(w) for w in words if w in known) / max(letters, 1)


# ---------------------------------------------------------------- tasks

# Of instructions: what they ask for is lost, or another thing, in another language.
_TASKS = {
    "eng_Latn": r"""
        rhym\w+ | alliterat\w+ | haikus? | limericks? | sonnets? | acrostics? | anagrams?
        | palindromes? | tongue.twisters? | puns? | crosswords? | syllables? | iambic | homophones?
        | spell(?:ing|ed)? | misspell\w* | typos? | punctuat\w+ | capitali[sz]\w+ | lower.?case
        | upper.?case | grammar | grammatical\w* | proofread\w* | synonyms? | antonyms?
        | conjugat\w+ | parts?\ of\ speech | (?:past|present|future)\ tense | (?:passive|active)
        \ voice | plural | prefix(?:es)? | suffix(?:es)? | nouns? | verbs? | adjectives? | adverbs?
        | pronouns? | acronyms? | abbreviations? | translat\w+ | (?:in|into|to)\ (?:english|french
        |spanish|german|chinese|japanese|latin) | starts?\ with\ the\ letter | vowels? | consonants?
        | python | java(?:script)? | c\+\+ | html | css | sql | regex | regular\ expressions? | bash
        | source\ code | (?:code|program|script|function|algorithm|query)\ (?:that|to|which|for|in)
        | pseudo.?code | json | xml | latex
    """,
    "fra_Latn": r"""
        rim\w+ | allitérat\w+ | haïkus? | sonnets? | acrostiches? | anagrammes? | palindromes?
        | virelangues? | calembours? | mots\ croisés | syllabes? | homophones? | orthographe\w*
        | ponctuat\w+ | majuscules? | minuscules? | grammair\w* | grammatical\w* | relis\w*
        | synonymes? | antonymes? | conjugu\w+ | pluriel | préfixes? | suffixes? | noms\ communs
        | verbes? | adjectifs? | adverbes? | pronoms? | acronymes? | abréviations? | tradui\w+
        | traduction | en\ (?:anglais|français|espagnol|allemand|chinois|japonais|latin)
        | voyelles? | consonnes? | python | java(?:script)? | c\+\+ | html | css | sql
        | expressions?\ régulières? | code\ source | pseudo.?code | json | xml | latex
        | (?:programme|script|fonction|algorithme|requête)\ (?:qui|pour)
    """,
}
_TASK_WORDS = {
    code: re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE | re.VERBOSE)
    for code, words in _TASKS.items()
}


def is_untranslatable(instruction: str, language: str) -> bool | None:
    """Whether a translation would spoil the task; None in a language whose words are not known."""
    if language not in _TASK_WORDS:
        return None
    return "```" in instruction or bool(_TASK_WORDS[language].search(instruction))
