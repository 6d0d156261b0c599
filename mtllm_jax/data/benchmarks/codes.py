"""What benchmarks call their languages → FLORES-200 codes, and how languages without one are read.

A language that NLLB does not know keeps a code of the same form (ISO 639-3, ISO 15924), such as
mad_Latn: tables and predictions name it by that. An LLM alone needs no code. An encoder that is
told its language is told the nearest one that it knows, its stand-in.
"""

from collections.abc import Collection, Mapping

from mtllm_jax.languages import check_language


def _by_prefix(codes: str, others: Mapping[str, str]) -> dict[str, str]:
    """FLORES-200 codes by what stands before their script, and those that are called otherwise."""
    return dict(sorted(({code[:3]: code for code in codes.split()} | dict(others)).items()))


# ISO 639-1, as XNLI, XCOPA and firefox-translations use it.
TWO_LETTER = {
    "af": "afr_Latn", "am": "amh_Ethi", "ar": "arb_Arab", "az": "azj_Latn", "be": "bel_Cyrl",
    "bg": "bul_Cyrl", "bn": "ben_Beng", "bs": "bos_Latn", "cy": "cym_Latn", "da": "dan_Latn",
    "de": "deu_Latn", "el": "ell_Grek", "en": "eng_Latn", "es": "spa_Latn", "et": "est_Latn",
    "fr": "fra_Latn", "gl": "glg_Latn", "gu": "guj_Gujr", "he": "heb_Hebr", "hi": "hin_Deva",
    "hr": "hrv_Latn", "ht": "hat_Latn", "hy": "hye_Armn", "id": "ind_Latn", "ig": "ibo_Latn",
    "it": "ita_Latn", "ja": "jpn_Jpan", "kn": "kan_Knda", "ko": "kor_Hang", "lt": "lit_Latn",
    "lv": "lvs_Latn", "ml": "mal_Mlym", "mr": "mar_Deva", "ms": "zsm_Latn", "mt": "mlt_Latn",
    "my": "mya_Mymr", "qu": "quy_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl", "sk": "slk_Latn",
    "sl": "slv_Latn", "sr": "srp_Cyrl", "sv": "swe_Latn", "sw": "swh_Latn", "ta": "tam_Taml",
    "te": "tel_Telu", "th": "tha_Thai", "tl": "tgl_Latn", "tr": "tur_Latn", "ur": "urd_Arab",
    "vi": "vie_Latn", "zh": "zho_Hans",
}  # fmt: skip

NUSAX = {
    "acehnese": "ace_Latn", "balinese": "ban_Latn", "banjarese": "bjn_Latn",
    "buginese": "bug_Latn", "english": "eng_Latn", "indonesian": "ind_Latn",
    "javanese": "jav_Latn", "madurese": "mad_Latn", "minangkabau": "min_Latn", "ngaju": "nij_Latn",
    "sundanese": "sun_Latn", "toba_batak": "bbc_Latn",
}  # fmt: skip

AMERICAS_NLI = {
    "aym": "ayr_Latn", "bzd": "bzd_Latn", "cni": "cni_Latn", "gn": "grn_Latn", "hch": "hch_Latn",
    "nah": "nah_Latn", "oto": "oto_Latn", "quy": "quy_Latn", "shp": "shp_Latn", "tar": "tar_Latn",
}  # fmt: skip

# Its Uyghur is in Cyrillic script.
KARDES_NLU = {
    "az": "azj_Latn", "kk": "kaz_Cyrl", "ky": "kir_Cyrl", "ug": "uig_Cyrl", "uz": "uzn_Latn",
}  # fmt: skip

# Nigerian Pidgin has no code in FLORES-200.
XLSUM = {
    "amharic": "amh_Ethi", "arabic": "arb_Arab", "azerbaijani": "azj_Latn", "bengali": "ben_Beng",
    "burmese": "mya_Mymr", "chinese_simplified": "zho_Hans", "chinese_traditional": "zho_Hant",
    "english": "eng_Latn", "french": "fra_Latn", "gujarati": "guj_Gujr", "hausa": "hau_Latn",
    "hindi": "hin_Deva", "igbo": "ibo_Latn", "indonesian": "ind_Latn", "japanese": "jpn_Jpan",
    "kirundi": "run_Latn", "korean": "kor_Hang", "kyrgyz": "kir_Cyrl", "marathi": "mar_Deva",
    "nepali": "npi_Deva", "oromo": "gaz_Latn", "pashto": "pbt_Arab", "persian": "pes_Arab",
    "pidgin": "pcm_Latn", "portuguese": "por_Latn", "punjabi": "pan_Guru", "russian": "rus_Cyrl",
    "scottish_gaelic": "gla_Latn", "serbian_cyrillic": "srp_Cyrl", "serbian_latin": "srp_Latn",
    "sinhala": "sin_Sinh", "somali": "som_Latn", "spanish": "spa_Latn", "swahili": "swh_Latn",
    "tamil": "tam_Taml", "telugu": "tel_Telu", "thai": "tha_Thai", "tigrinya": "tir_Ethi",
    "turkish": "tur_Latn", "ukrainian": "ukr_Cyrl", "urdu": "urd_Arab", "uzbek": "uzn_Latn",
    "vietnamese": "vie_Latn", "welsh": "cym_Latn", "yoruba": "yor_Latn",
}  # fmt: skip

# LASER's test set; its srp and uzb mix scripts, and the others that are left out have no code.
TATOEBA = _by_prefix(
    """
    afr_Latn amh_Ethi arz_Arab ast_Latn awa_Deva bel_Cyrl ben_Beng bos_Latn bul_Cyrl cat_Latn
    ceb_Latn ces_Latn cym_Latn dan_Latn deu_Latn ell_Grek epo_Latn est_Latn eus_Latn fao_Latn
    fin_Latn fra_Latn gla_Latn gle_Latn glg_Latn heb_Hebr hin_Deva hrv_Latn hun_Latn hye_Armn
    ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn kat_Geor kaz_Cyrl khm_Khmr kor_Hang
    lit_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl nld_Latn nno_Latn nob_Latn oci_Latn pes_Arab
    pol_Latn por_Latn ron_Latn rus_Cyrl slk_Latn slv_Latn spa_Latn swe_Latn swh_Latn tam_Taml
    tat_Cyrl tel_Telu tgl_Latn tha_Thai tuk_Latn tur_Latn uig_Arab ukr_Cyrl urd_Arab vie_Latn
    war_Latn xho_Latn yue_Hant zsm_Latn
    """,
    {
        "ara": "arb_Arab", "aze": "azj_Latn", "cmn": "zho_Hans", "kur": "kmr_Latn",
        "mon": "khk_Cyrl", "sqi": "als_Latn", "yid": "ydd_Hebr",
    },
)  # fmt: skip

# Without regional variants and nso, whose text reads as Southern Sotho.
NTREX = _by_prefix(
    """
    afr_Latn amh_Ethi arb_Arab bak_Cyrl bel_Cyrl bem_Latn ben_Beng bod_Tibt bos_Latn bul_Cyrl
    cat_Latn ces_Latn cym_Latn dan_Latn deu_Latn dzo_Tibt ell_Grek est_Latn eus_Latn ewe_Latn
    fao_Latn fij_Latn fin_Latn fra_Latn gle_Latn glg_Latn guj_Gujr hau_Latn heb_Hebr hin_Deva
    hrv_Latn hun_Latn hye_Armn ibo_Latn ind_Latn isl_Latn ita_Latn jpn_Jpan kan_Knda kat_Geor
    kaz_Cyrl khm_Khmr kin_Latn kir_Cyrl kmr_Latn kor_Hang lao_Laoo lit_Latn ltz_Latn mal_Mlym
    mar_Deva mkd_Cyrl mlt_Latn mri_Latn mya_Mymr nld_Latn nno_Latn nob_Latn nya_Latn pan_Guru
    pol_Latn por_Latn prs_Arab ron_Latn rus_Cyrl sin_Sinh slk_Latn slv_Latn smo_Latn som_Latn
    spa_Latn ssw_Latn swe_Latn tam_Taml tat_Cyrl tel_Telu tha_Thai tir_Ethi tsn_Latn tuk_Latn
    tur_Latn uig_Arab ukr_Cyrl urd_Arab vie_Latn wol_Latn xho_Latn yor_Latn yue_Hant zul_Latn
    """,
    {
        "aze-Latn": "azj_Latn", "ckb-Arab": "ckb_Arab", "fas": "pes_Arab", "fil": "tgl_Latn",
        "lav": "lvs_Latn", "mlg": "plt_Latn", "mon": "khk_Cyrl", "msa": "zsm_Latn",
        "nep": "npi_Deva", "orm": "gaz_Latn", "pus": "pbt_Arab", "sna-Latn": "sna_Latn",
        "snd-Arab": "snd_Arab", "sqi": "als_Latn", "srp-Cyrl": "srp_Cyrl", "swa": "swh_Latn",
        "tgk-Cyrl": "tgk_Cyrl", "uzb": "uzn_Latn", "zho-CN": "zho_Hans", "zho-TW": "zho_Hant",
    },
)  # fmt: skip

# NLLB-Seed's files are called by FLORES codes but for these, and English.
SEED = {
    code: {"gug_Latn": "grn_Latn", "zgh_Tfng": "tzm_Tfng"}.get(code, code)
    for code in """
    ace_Arab ace_Latn ary_Arab arz_Arab bam_Latn ban_Latn bho_Deva bjn_Arab bjn_Latn bug_Latn
    crh_Latn dik_Latn dzo_Tibt fur_Latn fuv_Latn gug_Latn hne_Deva kas_Arab kas_Deva knc_Arab
    knc_Latn lij_Latn lim_Latn lmo_Latn ltg_Latn mag_Deva mni_Beng mri_Latn nqo_Nkoo nus_Latn
    pbt_Arab prs_Arab scn_Latn shn_Mymr srd_Latn szl_Latn taq_Latn taq_Tfng vec_Latn zgh_Tfng
    """.split()
}

# The lexicons of GATITOS, in BCP 47. Without ts, which is Tswana again, cpf, which is Jamaican
# again, and dyu, which reads as Bambara.
GATITOS = {
    "ace": "ace_Latn", "aeb": "aeb_Arab", "ak": "twi_Latn", "apc": "apc_Arab", "ar-MA": "ary_Arab",
    "arz": "arz_Arab", "as": "asm_Beng", "awa": "awa_Deva", "ay": "ayr_Latn", "ba": "bak_Cyrl",
    "ban": "ban_Latn", "bem": "bem_Latn", "ber": "tzm_Tfng", "bho": "bho_Deva", "bjn": "bjn_Latn",
    "bjn-Arab": "bjn_Arab", "bm": "bam_Latn", "bo": "bod_Tibt", "bug": "bug_Latn", "ckb":
    "ckb_Arab", "crh-Latn": "crh_Latn", "din": "dik_Latn", "dz": "dzo_Tibt", "ee": "ewe_Latn",
    "es": "spa_Latn", "fa-AF": "prs_Arab", "ff": "fuv_Latn", "fj": "fij_Latn", "fo": "fao_Latn",
    "fon": "fon_Latn", "fr": "fra_Latn", "fur": "fur_Latn", "gn": "grn_Latn", "hi": "hin_Deva",
    "hne": "hne_Deva", "ilo": "ilo_Latn", "kac": "kac_Latn", "kg": "kon_Latn", "ki": "kik_Latn",
    "kr": "knc_Latn", "ks": "kas_Arab", "ks-Deva": "kas_Deva", "lg": "lug_Latn", "li": "lim_Latn",
    "lij": "lij_Latn", "lmo": "lmo_Latn", "ln": "lin_Latn", "ltg": "ltg_Latn", "lu": "lua_Latn",
    "luo": "luo_Latn", "lus": "lus_Latn", "mag": "mag_Deva", "mai": "mai_Deva", "min": "min_Latn",
    "mos": "mos_Latn", "nso": "nso_Latn", "nus": "nus_Latn", "oc": "oci_Latn", "om": "gaz_Latn",
    "pag": "pag_Latn", "pap": "pap_Latn", "qu": "quy_Latn", "rn": "run_Latn", "sa": "san_Deva",
    "scn": "scn_Latn", "sg": "sag_Latn", "shn": "shn_Mymr", "ss": "ssw_Latn", "szl": "szl_Latn",
    "ti": "tir_Ethi", "tn": "tsn_Latn", "tpi": "tpi_Latn", "tum": "tum_Latn", "vec": "vec_Latn",
    "war": "war_Latn", "wo": "wol_Latn", "yue": "yue_Hant",
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
    if code not in readable and stand_in in readable:
        return stand_in
    return check_language(code, readable)
