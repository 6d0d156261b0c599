"""English sentences for stage 1 from public parallel sets, as JSONL with the column text.

    python benchmarks/english_text.py --data=$MTLLM_DATA --output=english.jsonl

Reads the English sides of NTREX-128, NLLB-Seed and Tatoeba (LASER's test set) from clones of their
repositories, ntrex128/, nllb_seed/ and tatoeba/ in the folder; each sentence once.
"""

import argparse
import json
from pathlib import Path

SOURCES = (
    "ntrex128/NTREX-128/newstest2019-src.eng.txt",
    "nllb_seed/seed/eng_Latn",
    "tatoeba/data/tatoeba/v1/*.eng",
)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    texts: dict[str, None] = {}
    for pattern in SOURCES:
        files = sorted(options.data.glob(pattern))
        if not files:
            parser.error(f"{options.data / pattern} is not there")
        for file in files:
            lines = file.read_text(encoding="utf-8").splitlines()
            texts |= dict.fromkeys(line.strip() for line in lines if line.strip())
        print(f"{len(texts):,} sentences with {pattern}")
    with options.output.open("w", encoding="utf-8") as output:
        for text in texts:
            output.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
