"""Languages by their FLORES-200 code (`deu_Latn`): English name and, where there is one, CLDR's id.

The code is ISO 639-3 and ISO 15924: language, underscore, script. Two codes of one language (two
scripts) are two languages here, as they are in NLLB. NLLB's own vocabulary knows most of these
codes, not all: what a model can read is asked of its tokenizer, not of this table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

ENGLISH = "eng_Latn"

SCRIPTS = {
    "Arab": "Arabic", "Armn": "Armenian", "Beng": "Bengali", "Cyrl": "Cyrillic",
    "Deva": "Devanagari", "Ethi": "Ethiopic", "Geor": "Georgian", "Grek": "Greek",
    "Gujr": "Gujarati", "Guru": "Gurmukhi", "Hang": "Hangul", "Hans": "Simplified Han",
    "Hant": "Traditional Han", "Hebr": "Hebrew", "Jpan": "Japanese", "Khmr": "Khmer",
    "Knda": "Kannada", "Laoo": "Lao", "Latn": "Latin", "Mlym": "Malayalam", "Mymr": "Myanmar",
    "Nkoo": "N'Ko", "Olck": "Ol Chiki", "Orya": "Odia", "Sinh": "Sinhala", "Taml": "Tamil",
    "Telu": "Telugu", "Tfng": "Tifinagh", "Thai": "Thai", "Tibt": "Tibetan",
}  # fmt: skip

# code, CLDR's id of the same language in the same script ("-" below a hundred names), English name
_TABLE = """
ace_Arab - Acehnese (Arabic)
ace_Latn - Acehnese
acm_Arab - Mesopotamian Arabic
acq_Arab - Ta'izzi-Adeni Arabic
aeb_Arab - Tunisian Arabic
afr_Latn af Afrikaans
ajp_Arab - South Levantine Arabic
aka_Latn ak Akan
als_Latn sq Albanian
amh_Ethi am Amharic
apc_Arab - North Levantine Arabic
arb_Arab ar Arabic
arb_Latn - Arabic (Romanised)
ars_Arab - Najdi Arabic
ary_Arab - Moroccan Arabic
arz_Arab - Egyptian Arabic
asm_Beng as Assamese
ast_Latn ast Asturian
awa_Deva - Awadhi
ayr_Latn - Central Aymara
azb_Arab - South Azerbaijani
azj_Latn az North Azerbaijani
bak_Cyrl - Bashkir
bam_Latn bm Bambara
ban_Latn - Balinese
bel_Cyrl be Belarusian
bem_Latn - Bemba
ben_Beng bn Bengali
bho_Deva - Bhojpuri
bjn_Arab - Banjar (Arabic)
bjn_Latn - Banjar
bod_Tibt bo Tibetan
bos_Latn bs Bosnian
bug_Latn - Buginese
bul_Cyrl bg Bulgarian
cat_Latn ca Catalan
ceb_Latn ceb Cebuano
ces_Latn cs Czech
cjk_Latn - Chokwe
ckb_Arab ckb Central Kurdish
crh_Latn - Crimean Tatar
cym_Latn cy Welsh
dan_Latn da Danish
deu_Latn de German
dik_Latn - Southwestern Dinka
dyu_Latn - Dyula
dzo_Tibt dz Dzongkha
ell_Grek el Greek
eng_Latn en English
epo_Latn eo Esperanto
est_Latn et Estonian
eus_Latn eu Basque
ewe_Latn ee Ewe
fao_Latn fo Faroese
fij_Latn - Fijian
fin_Latn fi Finnish
fon_Latn - Fon
fra_Latn fr French
fur_Latn fur Friulian
fuv_Latn ff Nigerian Fulfulde
gaz_Latn om West Central Oromo
gla_Latn gd Scottish Gaelic
gle_Latn ga Irish
glg_Latn gl Galician
grn_Latn - Guarani
guj_Gujr gu Gujarati
hat_Latn ht Haitian Creole
hau_Latn ha Hausa
heb_Hebr he Hebrew
hin_Deva hi Hindi
hne_Deva - Chhattisgarhi
hrv_Latn hr Croatian
hun_Latn hu Hungarian
hye_Armn hy Armenian
ibo_Latn ig Igbo
ilo_Latn - Ilocano
ind_Latn id Indonesian
isl_Latn is Icelandic
ita_Latn it Italian
jav_Latn jv Javanese
jpn_Jpan ja Japanese
kab_Latn kab Kabyle
kac_Latn - Jingpho
kam_Latn kam Kamba
kan_Knda kn Kannada
kas_Arab ks Kashmiri (Arabic)
kas_Deva - Kashmiri (Devanagari)
kat_Geor ka Georgian
kaz_Cyrl kk Kazakh
kbp_Latn - Kabiye
kea_Latn kea Kabuverdianu
khk_Cyrl mn Halh Mongolian
khm_Khmr km Khmer
kik_Latn ki Kikuyu
kin_Latn - Kinyarwanda
kir_Cyrl ky Kyrgyz
kmb_Latn - Kimbundu
kmr_Latn ku Northern Kurdish
knc_Arab - Central Kanuri (Arabic)
knc_Latn - Central Kanuri
kon_Latn - Kikongo
kor_Hang ko Korean
lao_Laoo lo Lao
lij_Latn lij Ligurian
lim_Latn - Limburgish
lin_Latn ln Lingala
lit_Latn lt Lithuanian
lmo_Latn - Lombard
ltg_Latn - Latgalian
ltz_Latn lb Luxembourgish
lua_Latn - Luba-Kasai
lug_Latn lg Ganda
luo_Latn luo Luo
lus_Latn - Mizo
lvs_Latn lv Standard Latvian
mag_Deva - Magahi
mai_Deva mai Maithili
mal_Mlym ml Malayalam
mar_Deva mr Marathi
min_Arab - Minangkabau (Arabic)
min_Latn - Minangkabau
mkd_Cyrl mk Macedonian
mlt_Latn mt Maltese
mni_Beng - Meitei
mos_Latn - Mossi
mri_Latn mi Maori
mya_Mymr my Burmese
nld_Latn nl Dutch
nno_Latn nn Norwegian Nynorsk
nob_Latn nb Norwegian Bokmål
npi_Deva ne Nepali
nqo_Nkoo nqo N'Ko
nso_Latn - Northern Sotho
nus_Latn - Nuer
nya_Latn - Nyanja
oci_Latn oc Occitan
ory_Orya or Odia
pag_Latn - Pangasinan
pan_Guru pa Eastern Panjabi
pap_Latn pap Papiamento
pbt_Arab ps Southern Pashto
pes_Arab fa Western Persian
plt_Latn mg Plateau Malagasy
pol_Latn pl Polish
por_Latn pt Portuguese
prs_Arab fa_AF Dari
quy_Latn qu Ayacucho Quechua
ron_Latn ro Romanian
run_Latn rn Rundi
rus_Cyrl ru Russian
sag_Latn sg Sango
san_Deva - Sanskrit
sat_Olck sat Santali
scn_Latn scn Sicilian
shn_Mymr - Shan
sin_Sinh si Sinhala
slk_Latn sk Slovak
slv_Latn sl Slovenian
smo_Latn - Samoan
sna_Latn sn Shona
snd_Arab sd Sindhi
som_Latn so Somali
sot_Latn - Southern Sotho
spa_Latn es Spanish
srd_Latn sc Sardinian
srp_Cyrl sr Serbian
ssw_Latn - Swati
sun_Latn - Sundanese
swe_Latn sv Swedish
swh_Latn sw Swahili
szl_Latn szl Silesian
tam_Taml ta Tamil
taq_Latn - Tamasheq
taq_Tfng - Tamasheq (Tifinagh)
tat_Cyrl tt Tatar
tel_Telu te Telugu
tgk_Cyrl tg Tajik
tgl_Latn fil Tagalog
tha_Thai th Thai
tir_Ethi ti Tigrinya
tpi_Latn - Tok Pisin
tsn_Latn - Tswana
tso_Latn - Tsonga
tuk_Latn tk Turkmen
tum_Latn - Tumbuka
tur_Latn tr Turkish
twi_Latn - Twi
tzm_Tfng zgh Central Atlas Tamazight
uig_Arab ug Uyghur
ukr_Cyrl uk Ukrainian
umb_Latn - Umbundu
urd_Arab ur Urdu
uzn_Latn uz Northern Uzbek
vec_Latn vec Venetian
vie_Latn vi Vietnamese
war_Latn - Waray
wol_Latn wo Wolof
xho_Latn xh Xhosa
ydd_Hebr yi Eastern Yiddish
yor_Latn yo Yoruba
yue_Hant yue Cantonese
zho_Hans zh Chinese (Simplified)
zho_Hant zh_Hant Chinese (Traditional)
zsm_Latn ms Standard Malay
zul_Latn zu Zulu
"""


@dataclass(frozen=True)
class Language:
    """One FLORES-200 language. `locale` is CLDR's id, None where CLDR has hardly a name in it."""

    code: str
    locale: str | None
    name: str

    @property
    def script(self) -> str:
        """English name of the script: "Latin", "Cyrillic", …"""
        return SCRIPTS[self.code.split("_")[1]]


def _parse(table: str) -> dict[str, Language]:
    rows = (line.split(" ", 2) for line in table.strip().splitlines())
    return {c: Language(c, None if locale == "-" else locale, name) for c, locale, name in rows}


LANGUAGES: dict[str, Language] = _parse(_TABLE)


def check_language(code: str, allowed: Iterable[str] = tuple(LANGUAGES)) -> str:
    """Returns `code` if it is one of `allowed` (FLORES-200 codes; all known ones by default).

    Raises ValueError naming the three nearest allowed codes otherwise; a CLDR id ("de") or an
    English name ("German") counts as near to its code.
    """
    allowed = tuple(allowed)
    if code in allowed:
        return code

    def nearness(candidate: str) -> float:
        language = LANGUAGES.get(candidate)
        aliases = (language.locale or "", language.name) if language else ()
        wanted = code.lower()
        return max(SequenceMatcher(None, wanted, a.lower()).ratio() for a in (candidate, *aliases))

    nearest = sorted(allowed, key=nearness, reverse=True)[:3]
    raise ValueError(
        f"language {code!r} is not one of the {len(allowed)} allowed FLORES-200 codes:"
        f" the nearest are {', '.join(nearest)}"
    )
