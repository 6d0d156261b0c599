"""Real checkpoints here and in PyTorch: what they answer to the same real text.

    MTLLM_MODELS=MODELS MTLLM_DATA=DATA python benchmarks/parity.py > benchmarks/parity.md

MODELS holds smollm2-135m-instruct and multilingual-e5-small, DATA ntrex128 (NTREX-128, news in 128
languages). All in float32. tests/parity/test_real.py holds the same numbers to their bounds.

B rows, T positions, V vocabulary, E width.
"""

import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import torch
from dated import page, table
from flax import nnx
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mtllm_jax.hf.bert import load_bert
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.stack import segment_mean

COMMAND = "python benchmarks/parity.py"
PACKAGES = ("jax", "flax", "torch", "transformers", "numpy")
LLM, ENCODER = "smollm2-135m-instruct", "multilingual-e5-small"
# Of eleven scripts, as NTREX-128 calls them.
LANGUAGES = (
    "amh arb ben bul ell eng fin hau heb hin ind jpn kat kor rus spa swa tam tha zho-CN".split()
)
NEW_TOKENS = 24


def sentences(data: Path, language: str) -> list[str]:
    """All lines of NTREX-128 in a language; line n is the same sentence in each."""
    side = "src" if language == "eng" else "ref"
    path = data / "ntrex128" / "NTREX-128" / f"newstest2019-{side}.{language}.txt"
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]


def english(data: Path) -> list[str]:
    """200 English sentences of 20 to 80 characters, from all over the set."""
    short = [line for line in sentences(data, "eng") if 20 <= len(line) <= 80]
    return short[:: len(short) // 200][:200]


def prompts(data: Path) -> list[str]:
    """The first five words of 20 other sentences, the longest ones."""
    longest = sorted(sentences(data, "eng"), key=len)[-20:]
    return [" ".join(line.split()[:5]) for line in longest]


def multilingual(data: Path) -> list[str]:
    """Ten sentences in each of `LANGUAGES`, others in each."""
    return [
        line
        for i, language in enumerate(LANGUAGES)
        for line in sentences(data, language)[10 * i : 10 * i + 10]
    ]


def log_likelihoods(folder: Path, texts: Sequence[str]) -> tuple[list, list]:
    """(ours, torch's): for each text the log-probabilities [T − 1] of its tokens but the first."""
    rows = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    ours, theirs = load_llama(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    found: tuple[list, list] = ([None] * len(rows), [None] * len(rows))
    for members, ids, segments in _batches(rows):
        with torch.no_grad():
            logits = theirs(
                input_ids=torch.tensor(ids, dtype=torch.long),
                attention_mask=torch.tensor(segments),
            ).logits
        picked = torch.log_softmax(logits[:, :-1], -1).gather(
            2, torch.tensor(ids[:, 1:, None], dtype=torch.long)
        )
        for store, array in zip(
            found,
            (np.asarray(_next_log_probabilities(*nnx.split(ours), ids, segments)), picked[..., 0]),
            strict=True,
        ):
            for member, row in zip(members, np.asarray(array), strict=True):
                store[member] = row[: len(rows[member]) - 1]
    return found


def continuations(folder: Path, texts: Sequence[str]) -> tuple[list, list, float]:
    """(ours, torch's, smallest lead): the greedy tokens after each text, up to the end or
    `NEW_TOKENS`. Torch's are those of `generate`; ours are the best token at each place of one
    pass over text and continuation. Where all of them agree, so do two greedy decodings: by
    induction over the places, as each best token depends on agreed tokens alone. The lead is that
    of our best logit over the second: where it is tiny, two right answers may part."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    told = tokenizer(list(texts), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**told, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS)
    starts = [ids[mask > 0].tolist() for ids, mask in zip(*told.values(), strict=True)]
    theirs = []
    for row in out[:, told["input_ids"].shape[1] :].tolist():
        end = model.generation_config.eos_token_id
        theirs.append(row[: row.index(end) + 1] if end in row else row)
    ours, leads = [[] for _ in starts], []
    state = nnx.split(load_llama(folder))
    whole = [start + more for start, more in zip(starts, theirs, strict=True)]
    for members, ids, segments in _batches(whole):
        best, lead = (np.asarray(a) for a in _best(*state, ids, segments))
        for row, member in enumerate(members):
            places = slice(len(starts[member]) - 1, len(whole[member]) - 1)
            ours[member] = best[row, places].tolist()
            leads.append(lead[row, places].min())
    return ours, theirs, float(min(leads))


def embeddings(folder: Path, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ours, torch's) [number of texts, E]: means over the positions, scaled to length 1."""
    rows = AutoTokenizer.from_pretrained(folder)([f"query: {text}" for text in texts])["input_ids"]
    ours, theirs = load_bert(folder), AutoModel.from_pretrained(folder).eval()
    graph, state = nnx.split(ours)

    @jax.jit
    def pooled(state: nnx.State, ids: jax.Array, segments: jax.Array) -> jax.Array:
        return segment_mean(nnx.merge(graph, state).encode(ids, segments), segments, 1)[:, 0]

    found = np.zeros((2, len(rows), ours.config.width))  # float64: their cosine is near 1
    for members, ids, segments in _batches(rows):
        found[0, members] = pooled(state, ids, segments)
        with torch.no_grad():
            mask = torch.tensor(segments)
            h = theirs(torch.tensor(ids, dtype=torch.long), attention_mask=mask).last_hidden_state
        found[1, members] = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    return found[0], found[1]


def _batches(
    rows: Sequence[Sequence[int]], size: int = 20
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(numbers of the rows, ids, segments): rows of like length, padded at the right."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for begin in range(0, len(rows), size):
        members = order[begin : begin + size]
        width = -16 * (-max(len(rows[i]) for i in members) // 16)  # few widths, few compilations
        ids, segments = np.zeros((2, len(members), width), np.int32)
        for row, member in enumerate(members):
            ids[row, : len(rows[member])], segments[row, : len(rows[member])] = rows[member], 1
        yield members, ids, segments


def _logits(model: Llama, ids: jax.Array, segments: jax.Array) -> jax.Array:
    return model.logits(model.hidden(model.embed(ids), segments, causal=True))


@functools.partial(jax.jit, static_argnums=0)
def _next_log_probabilities(
    graph: nnx.GraphDef, state: nnx.State, ids: jax.Array, segments: jax.Array
) -> jax.Array:
    """[B, T − 1]: what each position gives to the token after it."""
    logits_BTV = _logits(nnx.merge(graph, state), ids, segments)[:, :-1]
    picked = jnp.take_along_axis(logits_BTV, ids[:, 1:, None], axis=2)[..., 0]
    return picked - jax.nn.logsumexp(logits_BTV, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _best(
    graph: nnx.GraphDef, state: nnx.State, ids: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(best token, its logit minus the second's), both [B, T]."""
    top, tokens = jax.lax.top_k(_logits(nnx.merge(graph, state), ids, segments), 2)
    return tokens[..., 0], top[..., 0] - top[..., 1]


def main() -> None:
    """Measure, and print the file."""
    models, data = (Path(os.environ[name]) for name in ("MTLLM_MODELS", "MTLLM_DATA"))
    rows, begin = [], time.monotonic()
    ours, theirs = log_likelihoods(models / LLM, english(data))
    apart = [abs(a.mean() - b.mean()) for a, b in zip(ours, theirs, strict=True)]
    worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    tokens = sum(map(len, theirs))
    nats = -sum(b.sum() for b in theirs) / tokens
    what = f"log-likelihood of {len(ours)} English sentences, {tokens} tokens, {nats:.3f} nats each"
    rows.append(
        (LLM, what, "largest difference of a sentence, nats per token", f"{max(apart):.1e}")
    )
    rows.append((LLM, "the same", "largest difference of a token, nats", f"{worst:.1e}"))
    ours, theirs, lead = continuations(models / LLM, prompts(data))
    equal = sum(
        a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )
    what = f"greedy continuation of {len(ours)} prompts"
    rows.append((LLM, what, "equal tokens", f"{equal} of {sum(map(len, theirs))}"))
    rows.append((LLM, "the same", "smallest lead of a best logit over the second", f"{lead:.3f}"))
    one, other = embeddings(models / ENCODER, multilingual(data))
    what = f"embeddings of {len(one)} sentences in {len(LANGUAGES)} languages"
    cosines = np.sum(one * other, axis=1)
    rows.append((ENCODER, what, "smallest cosine", f"1 − {1 - cosines.min():.1e}"))
    rows.append(
        (
            ENCODER,
            "the same",
            "largest difference of a component",
            f"{np.abs(one - other).max():.1e}",
        )
    )
    seconds = time.monotonic() - begin

    body = f"""
{seconds:.0f} s in all. Both sides compute in float32 on the CPU. The weights are 4-bit ones written
out in float32 (SmolLM2-135M-Instruct, Apache-2.0; multilingual-e5-small, MIT): real weights, though
a little worse than the originals. The text is NTREX-128 (CC-BY-SA-4.0), WMT's news of 2019.

{table(pd.DataFrame(rows, columns=["checkpoint", "what", "measure", "value"]))}
"""
    command = f"MTLLM_MODELS=MODELS MTLLM_DATA=DATA {COMMAND}"
    print(page("Real checkpoints here and in PyTorch", command, PACKAGES, body))


if __name__ == "__main__":
    main()
