"""What benchmarks call their languages → FLORES-200 codes, and how languages without one are read.

A language that NLLB does not know keeps a code of the same form (ISO 639-3, ISO 15924), such as
mad_Latn: tables and predictions name it by that. An LLM alone needs no code. An encoder that is
told its language is told the nearest one that it knows, its stand-in.
"""

from collections.abc import Collection

from mtllm_jax.languages import check_language

NUSAX = {
    "acehnese": "ace_Latn", "balinese": "ban_Latn", "banjarese": "bjn_Latn",
    "buginese": "bug_Latn", "english": "eng_Latn", "indonesian": "ind_Latn",
    "javanese": "jav_Latn", "madurese": "mad_Latn", "minangkabau": "min_Latn", "ngaju": "nij_Latn",
    "sundanese": "sun_Latn", "toba_batak": "bbc_Latn",
}  # fmt: skip

# What NLLB is told instead. The first three groups are the choices of the MT-LLM authors' public
# configs [code]; the others are ours: the same language in another script, or a neighbour.
STAND_INS = {
    # NusaX
    "mad_Latn": "ind_Latn", "nij_Latn": "ind_Latn", "bbc_Latn": "ind_Latn",
    # AmericasNLI: Bribri, Asháninka, Wixarika, Nahuatl, Otomí, Shipibo-Konibo, Rarámuri
    "bzd_Latn": "spa_Latn", "cni_Latn": "spa_Latn", "hch_Latn": "spa_Latn", "nah_Latn": "spa_Latn",
    "oto_Latn": "spa_Latn", "shp_Latn": "spa_Latn", "tar_Latn": "spa_Latn",
    # Kardeş-NLU
    "uig_Cyrl": "kaz_Cyrl",
    # Belebele
    "ben_Latn": "ben_Beng", "hin_Latn": "hin_Deva", "npi_Latn": "npi_Deva", "sin_Latn": "sin_Sinh",
    "urd_Latn": "urd_Arab",
    # SIB-200 (NLLB's own list has Santali as sat_Beng)
    "arb_Latn": "arb_Arab", "min_Arab": "min_Latn", "nqo_Nkoo": "bam_Latn", "sat_Olck": "sat_Beng",
}  # fmt: skip


def source_language(code: str, readable: Collection[str]) -> str:
    """The code that an encoder which reads `readable` is told for a row in `code`.

    That is `code` itself, or its stand-in. ValueError naming the three nearest if it reads neither.
    """
    stand_in = STAND_INS.get(code, code)
    return (
        stand_in
        if code not in readable and stand_in in readable
        else check_language(code, readable)
    )
