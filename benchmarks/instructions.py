"""200 short instructions in English, as JSONL with the columns id and prompt.

    python benchmarks/instructions.py --output=instructions.jsonl

Sentences are this file's own; countries, languages and currencies in them are CLDR's names. The
same file each time.
"""

import argparse
import json
from pathlib import Path

from babel import Locale

COUNTRIES = (
    "JP", "KE", "PE", "CA", "EG", "NO", "VN", "MX", "GH", "IN", "FR", "BR", "TR", "NZ", "TH", "MA",
    "FI", "CL", "PL", "KR",
)  # fmt: skip
LANGUAGES = (
    "sw", "ja", "ar", "hi", "fr", "es", "ko", "ru", "th", "el", "fi", "yo", "tr", "is", "vi", "ta",
    "he", "pl", "wo", "fo",
)  # fmt: skip
CURRENCIES = (
    "JPY", "KES", "PEN", "CAD", "EGP", "NOK", "VND", "MXN", "GHS", "INR", "EUR", "BRL", "TRY",
    "NZD", "THB", "MAD", "CLP", "PLN", "KRW", "USD",
)  # fmt: skip
THINGS = (
    "river", "library", "bicycle", "mountain", "kitchen", "teacher", "train", "garden", "market",
    "winter", "hospital", "bridge", "farmer", "newspaper", "dog", "window", "bread", "song",
    "school", "island",
)  # fmt: skip
TEMPLATES = (
    ("country", "In one sentence, where in the world is {}?"),
    ("country", "Name one food that people in {} eat, and say in one sentence what is in it."),
    ("country", "Give one reason in one sentence why somebody may want to visit {}."),
    ("language", "In one sentence, where is {} spoken?"),
    ("language", "Give one piece of advice, in one sentence, to somebody who begins to learn {}."),
    ("currency", "In one sentence, which country pays in the {}?"),
    ("thing", "Explain to a child in one sentence what this word means: {}."),
    ("thing", "Write one sentence in which this word occurs: {}."),
    ("thing", "Write two short questions about this: {}."),
    ("thing", "Name three words that have to do with this one: {}."),
)


def instructions() -> list[dict[str, str]]:
    """Each template with each of its twenty names."""
    english = Locale("en")
    names = {
        "country": [english.territories[code] for code in COUNTRIES],
        "language": [english.languages[code] for code in LANGUAGES],
        "currency": [english.currencies[code] for code in CURRENCIES],
        "thing": THINGS,
    }
    return [
        {"id": f"{kind}-{form}-{place}", "prompt": template.format(name)}
        for form, (kind, template) in enumerate(TEMPLATES)
        for place, name in enumerate(names[kind])
    ]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    rows = instructions()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    parser.parse_args().output.write_text(lines, encoding="utf-8")
    print(f"{len(rows)} instructions")


if __name__ == "__main__":
    main()
