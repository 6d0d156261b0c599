"""Texts of any script as words, where letters of scripts without spaces stand for words."""

import re
import unicodedata
from collections.abc import Sequence

# Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
_ALONE = (
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]"
)


def first_line(text: str) -> str:
    """Its first line that is not blank, where short answers are looked for."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def plain(text: str) -> str:
    """In lower case, without punctuation."""
    return without_punctuation(unicodedata.normalize("NFKC", text).lower(), " ")


def without_punctuation(text: str, instead: str = "") -> str:
    """Of all scripts. instead: what is put in its place."""
    return "".join(instead if unicodedata.category(c).startswith("P") else c for c in text)


def words(text: str) -> list[str]:
    """What blanks part, but each letter of scripts without spaces, with the marks on it, by itself;
    letters and digits of others between them stay together."""
    text = re.sub(f"({_ALONE})", r" \1", text)
    text = re.sub(f"(?<={_ALONE})(?!{_ALONE})(?=\\w)", " ", text)
    return _with_marks(text.split())


def _with_marks(tokens: Sequence[str]) -> list[str]:
    """Each token that is but a mark joined to the one before."""
    joined: list[str] = []
    for token in tokens:
        if joined and all(unicodedata.category(c).startswith("M") for c in token):
            joined[-1] += token
        else:
            joined.append(token)
    return joined
