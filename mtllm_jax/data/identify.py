"""What language a text is in, asked only of languages that the identifier knows.

The identifier is py3langid: 139 languages, numpy alone, its model inside the wheel. It takes any
text for one of its own languages, so that about others its word is worth nothing. KNOWN lists the
FLORES-200 codes whose label it has, and that it gave at least 95 of 100 sentences of the language
(SIB-200's dev split).
"""

import functools
import unicodedata
from typing import Any

from mtllm_jax.languages import LANGUAGES

LEAST_LETTERS = 20  # below that a text may be in many languages; a wide character counts threefold

# Called by CLDR's id of the language.
_BY_LOCALE = """
afr_Latn amh_Ethi asm_Beng azj_Latn bel_Cyrl ben_Beng bul_Cyrl cat_Latn ces_Latn cym_Latn
deu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn fao_Latn fin_Latn fra_Latn gaz_Latn
gla_Latn gle_Latn glg_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hun_Latn hye_Armn ibo_Latn
isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn kan_Knda kat_Geor kaz_Cyrl khk_Cyrl khm_Khmr kir_Cyrl
kmr_Latn kor_Hang lao_Laoo lij_Latn lin_Latn lit_Latn ltz_Latn lug_Latn lvs_Latn mal_Mlym mar_Deva
mkd_Cyrl mlt_Latn mya_Mymr nld_Latn npi_Deva oci_Latn ory_Orya pan_Guru pbt_Arab pes_Arab plt_Latn
pol_Latn por_Latn quy_Latn ron_Latn rus_Cyrl sin_Sinh slk_Latn slv_Latn sna_Latn som_Latn spa_Latn
als_Latn swe_Latn swh_Latn tam_Taml tel_Telu tgk_Cyrl tha_Thai tuk_Latn tur_Latn uig_Arab ukr_Cyrl
urd_Arab uzn_Latn vec_Latn vie_Latn yor_Latn
"""
# Called otherwise, or taken for each other: any of these labels will do.
_OTHERWISE = {
    "ace_Latn": ("ace",), "bak_Cyrl": ("ba",), "crh_Latn": ("crh",), "grn_Latn": ("gug",),
    "kik_Latn": ("kik",), "kin_Latn": ("rw",), "ltg_Latn": ("ltg",), "nso_Latn": ("nso",),
    "prs_Arab": ("fa",), "san_Deva": ("sa",), "sot_Latn": ("st",), "tat_Cyrl": ("tt", "ba"),
    "tgl_Latn": ("tl",),
    **dict.fromkeys(("arb_Arab", "ary_Arab", "arz_Arab"), ("ar", "ary", "arz")),
    **dict.fromkeys(("bos_Latn", "hrv_Latn", "srp_Cyrl"), ("bs", "hr", "sr")),
    **dict.fromkeys(("dan_Latn", "nno_Latn", "nob_Latn"), ("da", "nn", "no")),
    **dict.fromkeys(("ind_Latn", "zsm_Latn"), ("id", "ms")),
    **dict.fromkeys(("xho_Latn", "zul_Latn"), ("xh", "zu")),
    **dict.fromkeys(("yue_Hant", "zho_Hans", "zho_Hant"), ("yue", "zh", "wuu")),
}  # fmt: skip

# FLORES-200 code → the identifier's labels for it.
KNOWN: dict[str, tuple[str, ...]] = {
    code: (LANGUAGES[code].locale or "",) for code in _BY_LOCALE.split()
} | _OTHERWISE


def is_in(text: str, language: str) -> bool | None:
    """Whether the text is in the language; None where that cannot be told: the identifier does not
    know the language, or the text is too short."""
    if language not in KNOWN or num_letters(text) < LEAST_LETTERS:
        return None
    return _label(text) in KNOWN[language]


def num_letters(text: str) -> int:
    """Letters of the text; one that is written wide (Chinese, Japanese, Korean) counts threefold,
    as it says about as much."""
    return sum(3 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if c.isalpha())


def _label(text: str) -> str:
    return str(_classify()(text)[0])


@functools.cache
def _classify() -> Any:
    import py3langid  # late: its model takes a moment to read

    return py3langid.classify
