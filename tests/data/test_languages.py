"""The table of languages against babel and unicodedata, and the error for an unknown code."""

import re
import unicodedata

import pytest
from babel import Locale

from mtllm_jax.languages import LANGUAGES, check_language


def test_table():
    assert len(LANGUAGES) == 205  # SIB-200's folders, English included
    for code, language in LANGUAGES.items():
        assert re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", code)
        assert language.script and language.name


def test_locales_are_written_in_the_script_of_the_code():
    """By the name of Japan, Kenya and others, as Unicode names their letters."""
    words = {
        "Hans": "CJK", "Hant": "CJK", "Jpan": "KATAKANA", "Grek": "GREEK", "Nkoo": "NKO",
        "Olck": "OL CHIKI", "Orya": "ORIYA", "Armn": "ARMENIAN",
    }  # fmt: skip
    for code, language in LANGUAGES.items():
        if language.locale is None:
            continue
        names = "".join(Locale.parse(language.locale).territories.get(t, "") for t in ("KE", "PE"))
        letters = [unicodedata.name(c) for c in names if c.isalpha()]
        script = words.get(code.split("_")[1], language.script.upper())
        assert letters, code
        assert all(letter.startswith(script) for letter in letters), code


def test_check_language():
    assert check_language("deu_Latn") == "deu_Latn"
    with pytest.raises(ValueError, match=r"'deu_latn' is not one of the 205 .* are deu_Latn, "):
        check_language("deu_latn")
    for alias in ("de", "German"):
        with pytest.raises(ValueError, match=rf"'{alias}' is not .*: the nearest are deu_Latn, "):
            check_language(alias)
    with pytest.raises(ValueError, match=r"2 allowed .* are jpn_Jpan, kor_Hang$"):
        check_language("jpn_Japn", ["kor_Hang", "jpn_Jpan"])
