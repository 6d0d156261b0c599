"""MKQA's scores (Longpre et al. 2021): exact match and F1 of tokens, the best over all answers.

As the official mkqa_eval_util.py of github.com/apple/ml-mkqa has them, and mended. Official: text
in lower case, without ASCII punctuation and then without articles; in Chinese, Japanese, Thai and
Khmer every character is a token, those of names in Latin script and of numbers too; French and
Italian articles are cut from the front of longer words, and Arabic's from anywhere. Mended:
punctuation is all of Unicode's, articles are whole words (Arabic's a prefix), and of those four
scripts alone a character is a token, with the marks on it; other words stay whole.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Sequence

from mtllm_jax.asking.words import without_punctuation, words

_BY_CHARACTER = ("zh_cn", "zh_hk", "zh_tw", "ja", "th", "km")
# Of the official script, in its order.
_ARTICLES = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "nl": "de het een des der den",
    "sv": "en ett",
    "da": "en et",
    "no": "en et ei",
    "fr": "le la l' les du de d' des un une",
    "pt": "o a os as um uma uns umas",
    "it": "il lo la l' i gli le del dello della dell' dei degli degl' delle un' uno una un",
    "fi": "se yks yksi",
    "hu": "a az egy",
}
_OPEN = ("fr", "it")  # whose official pattern does not ask where a word ends
_ARABIC = "ال"
Tokens = Callable[[str, str], list[str]]  # of a text, by the language as MKQA calls it


def official_tokens(text: str, language: str) -> list[str]:
    """As the official script has them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    if language == "ar":
        text = text.replace(_ARABIC, " ")
    elif language in _ARTICLES:
        ends = "" if language in _OPEN else r"\b"
        text = re.sub(rf"\b({'|'.join(_ARTICLES[language].split())}){ends}", " ", text)
    if language in _BY_CHARACTER:
        return [c for c in text if c.strip()]
    return text.split()


def mended_tokens(text: str, language: str) -> list[str]:
    """The same as it was meant."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    if language == "ar":
        text = re.sub(rf"\b{_ARABIC}(?=\w)", "", text)
    elif language in _ARTICLES:
        articles = _ARTICLES[language].split()
        closed = "|".join(word for word in articles if not word.endswith("'"))
        open_ = "|".join(word for word in articles if word.endswith("'")) or r"(?!)"
        text = re.sub(rf"\b(?:(?:{closed})\b(?!')|(?:{open_})(?=\w))", " ", text)
    text = without_punctuation(text)
    return words(text) if language in _BY_CHARACTER else text.split()


def exact_match(answer: str, labels: Sequence[str], language: str, tokens: Tokens) -> float:
    """1 where one of the labels has the same tokens, else 0."""
    said = tokens(answer, language)
    return float(any(said == tokens(label, language) for label in labels))


def f1(answer: str, labels: Sequence[str], language: str, tokens: Tokens) -> float:
    """Of the tokens of the answer and of that label that it is best with."""
    said = tokens(answer, language)
    return max(_f1(said, tokens(label, language)) for label in labels)


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = (collections.Counter(said) & collections.Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))
