"""How much of a language is at hand for building systems: the classes of Joshi et al. (2020).

doi:10.18653/v1/2020.acl-main.560 sorts languages by their unlabelled and labelled data, from class
0 (hardly any) to 5 (most); its list, https://microsoft.github.io/linguisticdiversity/, has names,
no codes. Classes 1 to 5 are written down here by ISO 639-3, the scripts of a language alike. A
standard variety stands for the language that the list names (lvs for Latvian, plt for Malagasy).
A variety of a name of its own has no part in it: Dari is not Persian, nor Tunisian Arabic Arabic.
"""

_CLASSES = {
    5: "arb deu eng fra jpn spa zho",
    4: "cat ces eus fin hin hrv hun ita kor nld pes pol por rus srp swe tur vie",
    3: """
        afr arz bel ben bos bul ceb dan ell est glg heb ind kat kaz lit lvs ron slk slv tam tgl tha
        ukr urd uzn zsm
    """,
    2: "amh gle hat hau isl lao mar mlt pan san swh tir tsn wol xho yor zul",
    1: """
        ace aka als asm ast ayr azb azj bak bam bho bjn bod bug ckb crh cym dik dzo epo ewe fao fij
        fur fuv gaz gla grn guj hye ibo ilo jav kab kan kas kbp khk khm kik kin kir kmr kon lij lim
        lin lmo ltg ltz lug mai mal min mkd mri mya nah nno nob npi nso nya oci ory pag pap pbt plt
        quy run sag sat scn sin smo sna snd som sot srd ssw sun szl tat tel tgk tpi tso tuk tum twi
        uig vec war ydd yue
    """,
}
_CLASS_OF = {code: number for number, codes in _CLASSES.items() for code in codes.split()}

REST = "0, or not in the list"


def resource_class(code: str) -> str:
    """ "1" to "5" for a FLORES-200 code, or `REST`."""
    return str(_CLASS_OF.get(code.split("_")[0], REST))
