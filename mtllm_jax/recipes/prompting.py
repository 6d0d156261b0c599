"""The baseline that learns nothing: the LLM says which label or choice goes on best from a prompt.

It reads causally, as it was pretrained. A prompt is read once, and all that may follow it stands in
the same row, each part as if alone behind the prompt (`Llama.hidden`, branches).

B rows, T positions of prompts, P positions of what may follow, C labels or choices, D width.
"""

import collections
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax import sharding
from mtllm_jax.config import Evaluation
from mtllm_jax.data.packing import padded, padded_length
from mtllm_jax.data.pipeline import by_length
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.evaluation import Predict
from mtllm_jax.example_flops import branching_flops
from mtllm_jax.models.llama import Llama
from mtllm_jax.ops.vocab_loss import log_likelihoods
from mtllm_jax.tasks.prompt import PROMPTS, kind_of, last_words, prompts
from mtllm_jax.tasks.task import Row, Task

_CHUNK = 1024  # tokens whose logits exist at a time

Tokens = tuple[np.ndarray, list[np.ndarray]]  # of a prompt, and of each that may follow


def template_of(limits: Evaluation, task: Task) -> str:
    """The user's, else the task's own, else that of its kind."""
    return limits.prompt or task.prompt or PROMPTS[kind_of(task.train[0])]


def prompted(
    limits: Evaluation,
    llm: Llama,
    tokenizer: TargetTokenizer,
    task: Task,
    *,
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh,
) -> Predict:
    """Rows → the labels that are likeliest behind their prompts."""
    score = Scores(llm, tokenizer.pad_id, limits.batch_rows, dtype=dtype, mesh=mesh)

    def predict(rows: Sequence[Row]) -> list[str]:
        tokens = prompt_tokens(limits, tokenizer, task, rows)
        scores_MC = score(tokens)
        if limits.prompt_score == "mean":
            scores_MC = scores_MC / np.array([[len(c) for c in one] for _, one in tokens])
        return [task.labels[i] for i in np.argmax(scores_MC, axis=1)]

    return predict


def prompt_tokens(
    limits: Evaluation, tokenizer: TargetTokenizer, task: Task, rows: Sequence[Row]
) -> list[Tokens]:
    """What the LLM is asked about each row. Prompts are cut at `max_length` tokens."""
    template = template_of(limits, task)
    told = prompts(template, rows, task.labels)
    read = tokenizer.encode_prompts(told, max_length=limits.max_length)
    before, num = last_words(template), len(task.labels)
    if not task.num_choices:
        replaced, following = tokenizer.encode_continuations(before, task.labels)
        return [(ids[: len(ids) - replaced], following) for ids in read]
    choices = list(itertools.chain.from_iterable(row["choices"] for row in rows))
    replaced, following = tokenizer.encode_continuations(before, choices)
    return [
        (ids[: len(ids) - replaced], following[i * num : (i + 1) * num])
        for i, ids in enumerate(read)
    ]


def longest_row(
    limits: Evaluation, tokenizer: TargetTokenizer, task: Task, rows: Sequence[Row], ways: int
) -> int:
    """Positions of a prompt and all that may follow it, at most. ways: that rows are cut into."""
    tokens = prompt_tokens(limits, tokenizer, task, rows)
    prompt = max(len(ids) for ids, _ in tokens)
    following = max(sum(map(len, said)) for _, said in tokens)
    return padded_length(prompt, ways) + padded_length(following, ways)


def prompt_flops(
    limits: Evaluation, llm: Llama, tokenizer: TargetTokenizer, task: Task, rows: Sequence[Row]
) -> float:
    """Of the answers to these rows, paddings left out."""
    tokens = prompt_tokens(limits, tokenizer, task, rows)
    sizes = collections.Counter((len(ids), *map(len, said)) for ids, said in tokens)
    return sum(n * branching_flops(llm, size[0], size[1:]) for size, n in sizes.items())


class Scores:
    """log p(what may follow | prompt), summed over its tokens, for each that may.

    Several processes call it with the same tokens, and all get the scores. ValueError if rows
    cannot be cut over the mesh.
    """

    def __init__(
        self,
        llm: Llama,
        pad_id: int,
        batch_rows: int,
        *,
        dtype: DTypeLike,
        mesh: jax.sharding.Mesh,
    ):
        sharding.check_rows(batch_rows, mesh, "evaluation.batch_rows")
        graph, state = nnx.split(llm)

        def run(state: nnx.State, num_branches: int, *batch: Array) -> Array:
            llm = nnx.merge(graph, state)
            return branch_scores(llm, *batch, num_branches=num_branches, dtype=dtype)

        everywhere = jax.NamedSharding(mesh, jax.P())
        self._run = jax.jit(sharding.on(mesh, run), static_argnums=1, out_shardings=everywhere)
        self._state = sharding.place(state, mesh)
        self._pad_id, self._batch_rows, self._mesh = pad_id, batch_rows, mesh

    def __call__(self, tokens: Sequence[Tokens]) -> np.ndarray:
        """float32 [rows, C]."""
        num = len(tokens[0][1])
        pending = []
        for places in by_length([len(prompt) for prompt, _ in tokens], self._batch_rows):
            batch = self._batch([tokens[i] for i in places])
            # Dispatch does not wait: the next batch is padded while this one is computed.
            pending.append((places, self._run(self._state, num, *batch.values())))
        result = np.empty((len(tokens), num), np.float32)
        for places, scores_BC in pending:
            result[places] = np.asarray(scores_BC)[: len(places)]
        return result

    def _batch(self, tokens: Sequence[Tokens]) -> dict[str, Array]:
        rows, ways = self._batch_rows, self._mesh.shape["context"]
        branches = [np.concatenate(following) for _, following in tokens]
        batch = padded(
            [prompt for prompt, _ in tokens], "prompt", self._pad_id, rows=rows, ways=ways
        ) | padded(branches, "branch", self._pad_id, rows=rows, ways=ways)
        for row, (_, following) in zip(batch["branch_segments"], tokens, strict=False):
            sizes = [len(ids) for ids in following]
            row[: sum(sizes)] = np.repeat(np.arange(2, 2 + len(sizes)), sizes)
        return sharding.place_batch(batch, self._mesh)


def branch_scores(
    llm: Llama,
    ids_BT: Array,
    segments_BT: Array,
    branch_ids_BP: Array,
    branch_segments_BP: Array,
    *,
    num_branches: int,
    dtype: DTypeLike,
) -> Array:
    """Summed log-likelihood of each branch behind the row's prompt. float32 [B, C].

    Prompts are segment 1, from their rows' first position on; branch c is segment 2 + c.
    """
    T, P = ids_BT.shape[1], branch_ids_BP.shape[1]
    ids = jnp.concatenate([ids_BT, branch_ids_BP], axis=1)
    segments = jnp.concatenate([segments_BT, branch_segments_BP], axis=1)
    h = llm.hidden(llm.embed(ids, dtype), segments, causal=True, branches=True)
    # A token is said at the one before it: a branch's first at the end of the prompt.
    before_BP = jnp.pad(branch_segments_BP[:, :-1], ((0, 0), (1, 0)))
    end_B1 = jnp.sum(segments_BT, axis=1, keepdims=True) - 1
    place_P = T - 1 + jnp.arange(P, dtype=jnp.int32)
    place_BP = jnp.where(branch_segments_BP == before_BP, place_P[None], end_B1)
    h_BPD = jnp.take_along_axis(h, place_BP[..., None], axis=1)
    kernel_VD = llm.output_kernel().astype(dtype)
    said_M = log_likelihoods(
        h_BPD.reshape(-1, h_BPD.shape[-1]), kernel_VD, branch_ids_BP.reshape(-1), chunk=_CHUNK
    )
    member_BPC = branch_segments_BP[..., None] == 2 + jnp.arange(num_branches)[None, None]
    return jnp.einsum("bp,bpc->bc", said_M.reshape(-1, P), member_BPC.astype(jnp.float32))
