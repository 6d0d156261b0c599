"""How full rows of 512 tokens are on real English text, by packer and by the rows' lengths.

    MTLLM_DATA=DATA MTLLM_MODELS=MODELS python benchmarks/packing.py [--run=RUN]

The English sides of NTREX-128 (DATA/ntrex128) and NLLB-Seed (DATA/nllb_seed), tokenised for an
encoder and for an LLM: multilingual-e5-small (XLM-R's tokenizer) and SmolLM2-135M-Instruct, which
lie in MODELS; with --run the two mini models of a finished default run too. Leaves a dated Markdown
file beside this one.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pandas as pd
from dated import page, table, write

from mtllm_jax.data.packing import fitting_lengths, pack
from mtllm_jax.data.tokenise import TargetTokenizer, encode_cut, source_tokenizer
from mtllm_jax.languages import ENGLISH

PACKAGES = ("grain", "numpy", "tokenizers", "transformers")
FILES = ("ntrex128/NTREX-128/newstest2019-src.eng.txt", "nllb_seed/seed/eng_Latn")
LONGEST = 512
SIDES = ("source", "target")
Texts = Sequence[Mapping[str, np.ndarray]]


def texts_of(data: Path) -> list[str]:
    """All lines, in an order of their own, as stage 1 draws them."""
    lines = [line for name in FILES for line in (data / name).read_text("utf-8").splitlines()]
    return [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]


def tokenised(
    encoder: Path, llm: Path, texts: Sequence[str], lengths: Mapping[str, int]
) -> tuple[Texts, dict[str, int]]:
    """Tokens of each text by side, and how many texts were cut."""
    source, target = source_tokenizer(encoder), TargetTokenizer(llm)
    sources, cut_sources = encode_cut(
        lambda some, length: source.encode(some, ENGLISH, max_length=length),
        texts,
        lengths["source"],
        len,
    )
    targets, cut_targets = encode_cut(
        lambda some, length: target.encode(some, max_length=length), texts, lengths["target"], len
    )
    pairs = zip(sources, targets, strict=True)
    tokens = [{"source": one, "target": other} for one, other in pairs]
    return tokens, {"source": cut_sources, "target": cut_targets}


def by_grain(packer: Any, open_rows: int) -> Callable[[Texts, Mapping[str, int]], int]:
    """The number of rows that one of grain's packers makes."""

    def rows(tokens: Texts, lengths: Mapping[str, int]) -> int:
        data = grain.MapDataset.source(tokens).to_iter_dataset(grain.ReadOptions(0, 0))
        return sum(
            1
            for _ in packer(
                data, length_struct=dict(lengths), num_packing_bins=open_rows, shuffle_bins=False
            )
        )

    return rows


def ours(tokens: Texts, lengths: Mapping[str, int]) -> int:
    """The number of rows that `data.packing` makes."""
    return len(pack(tokens, lengths, dict.fromkeys(SIDES, 0)))


first_fit = grain.experimental.FirstFitPackIterDataset
best_fit = grain.experimental.BestFitPackIterDataset
PACKERS = {
    "one text a row": lambda tokens, lengths: len(tokens),
    "grain, first fit, 32 open rows": by_grain(first_fit, 32),
    "grain, first fit, 1000 open rows": by_grain(first_fit, 1000),
    "grain, best fit, 1000 open rows": by_grain(best_fit, 1000),
    "data/packing.py": ours,
}


def measure(name: str, encoder: Path, llm: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """A line of the table for each packer and both choices of lengths."""
    equal = dict.fromkeys(SIDES, LONGEST)
    tokens, _ = tokenised(encoder, llm, texts, equal)
    counts = {side: sum(len(text[side]) for text in tokens) for side in SIDES}
    fitted = fitting_lengths(counts, equal)
    lines = []
    for lengths in (equal, fitted):
        tokens, cut = tokenised(encoder, llm, texts, lengths)
        dropped = sum(not len(text[side]) for text in tokens for side in SIDES)
        for packer, rows_of in PACKERS.items():
            if lengths is equal and packer != "data/packing.py":
                continue  # whatever the packer, the shorter stream stays open
            begin = time.monotonic()
            rows = rows_of(tokens, lengths)
            seconds = time.monotonic() - begin
            fill = {
                side: sum(len(text[side]) for text in tokens) / (rows * lengths[side])
                for side in SIDES
            }
            lines.append(
                {
                    "tokenizers": name,
                    "row, tokens": f"{lengths['source']} + {lengths['target']}",
                    "packer": packer,
                    "encoder side full": f"{fill['source']:.2%}",
                    "LLM side full": f"{fill['target']:.2%}",
                    "rows": rows,
                    "texts a row": f"{len(tokens) / rows:.1f}",
                    "dropped": dropped,
                    "cut": f"{cut['source']} + {cut['target']}",
                    "packing, s": f"{seconds:.2f}",
                }
            )
    return lines


def main() -> None:
    """Measure, and leave the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a finished default run")
    run = parser.parse_args().run
    data, models = (Path(os.environ[name]) for name in ("MTLLM_DATA", "MTLLM_MODELS"))
    texts = texts_of(data)
    encoder, llm = models / "multilingual-e5-small", models / "smollm2-135m-instruct"
    lines = measure("XLM-R, SmolLM2", encoder, llm, texts)
    if run is not None:
        lines += measure(
            "mini NLLB, mini Llama", run / "mini_nllb/model", run / "mini_llama/model", texts
        )
    body = f"""
{len(texts)} English sentences: NTREX-128 (newstest2019-src.eng.txt) and NLLB-Seed (eng_Latn), in
random order. A row holds a stream of encoder tokens and one of LLM tokens, of the same texts; both
are to be at least 97.5 % full. Where lengths differ they follow the ratio of the texts' tokens
(`fitting_lengths`, what `launch/prepare.py --fit_lengths` chooses): {LONGEST}, and a multiple of 8.

{table(pd.DataFrame(lines))}

Two rows of {LONGEST} leave the stream of fewer tokens open whatever the packer. grain's look for a
row with room in both streams, or with least room in sum; as texts differ in their ratio, each
row keeps some room in one of the streams. `data/packing.py` looks for the row whose room has the
shape of the text, the longest texts first.
"""
    command = "MTLLM_DATA=DATA MTLLM_MODELS=MODELS python benchmarks/packing.py"
    command += " --run=RUN" if run is not None else ""
    write("packing", page("How full packed rows are", command, PACKAGES, body))


if __name__ == "__main__":
    main()
