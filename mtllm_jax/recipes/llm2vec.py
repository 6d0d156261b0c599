"""LLM2Vec (arXiv 2404.05961): an LLM learns to read both ways before anything is stacked on it.

Two stages, each of which may be left out. In masked next-token prediction (MNTP) tokens are hidden
and predicted from the position before them, as the LLM has always predicted, but with all of the
text in sight. In unsupervised SimCSE (arXiv 2104.08821) what the LLM makes of a text twice, with
other parts of it dropped out each time, is to be more alike than what it makes of other texts.

Each trains adapters on the LLM and leaves them as a PEFT folder in the run; what comes after reads
the LLM with them merged, as it does with adapters of the user's own (`llm_adapters`).

B rows, N texts per row, T positions, D width, V vocabulary.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtllm_jax import distributed
from mtllm_jax.config import MTLLM, MaskedPrediction, Training
from mtllm_jax.data import packing
from mtllm_jax.data.held_out import hold_out_rows, hold_out_texts
from mtllm_jax.data.packing import Counts, Rows
from mtllm_jax.data.prepare import order_of
from mtllm_jax.data.prepared import Prepared
from mtllm_jax.data.texts import Texts
from mtllm_jax.data.tokenise import TargetTokenizer, encode_cut
from mtllm_jax.hf.files import Files, local_files
from mtllm_jax.hf.peft import save_peft
from mtllm_jax.models.layers import LoRAParam, split, weight
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.stack import llm_pooled
from mtllm_jax.objectives import Terms, contrastive, next_tokens
from mtllm_jax.ops.vocab_loss import cross_entropy_of_rows
from mtllm_jax.recipes.job import Job
from mtllm_jax.recipes.stacking import load_llm, with_adapters
from mtllm_jax.runfolder import made_locally
from mtllm_jax.train import Objective, fit

_LAST = "adapter_config.json"  # of the files of an adapter

TITLES = {"mntp": "MNTP", "simcse": "SimCSE"}

# (config, tokenizer, graph of the LLM with its adapters) → what is minimised
ObjectiveOf = Callable[[MTLLM, TargetTokenizer, nnx.GraphDef], Objective]


def prepared_llm(
    job: Job[MTLLM], llm_folder: str, english: Texts | Prepared | None
) -> tuple[str, ...]:
    """Train what the config asks for. Returns the folders of all adapters to be merged into the
    LLM in turn: the config's, and those of the stages. english: what they learn from."""
    adapters = job.config.llm_adapters
    asked = job.config.stages()
    for name, objective in (("mntp", masked_prediction), ("simcse", read_twice)):
        if training := asked.get(f"{name}.training"):
            assert english is not None  # stage 1 is trained where these are, and reads it too
            folder = _trained(job, name, objective, training, llm_folder, adapters, english)
            adapters = (*adapters, folder)
    return adapters


def _trained(
    job: Job[MTLLM],
    name: str,
    objective: ObjectiveOf,
    training: Training,
    llm_folder: str,
    adapters: tuple[str, ...],
    english: Texts | Prepared,
) -> str:
    """One stage, on the LLM with `adapters` merged; returns the folder of its own."""
    seed, title = job.stage_seed(name), TITLES[name]
    with job.stage(name, f"LLM preparation, {title}") as stage:
        folder = os.fspath(stage.path / "adapter")
        if distributed.by_first(lambda: Files(folder).has(_LAST)):
            return folder
        tokenizer = TargetTokenizer(local_files(llm_folder))
        base = load_llm(job.config, llm_folder, adapters, job.mesh, job.console)
        by_adapters = dataclasses.replace(job.config, trained="lora")
        graph, trainable, frozen = split(with_adapters(by_adapters, base, seed), LoRAParam)

        def rows() -> Rows:
            packed = text_rows(job.config, tokenizer, english, training, seed)
            job.console.print(packed.told())
            return packed

        trained = fit(
            stage,
            title,
            training,
            objective=objective(job.config, tokenizer, graph),
            trainable=trainable,
            frozen=frozen,
            rows=rows,
            mesh=job.mesh,
            seed=seed,
            console=job.console,
            watch=job.watch,
        )
        adapted = " with the adapters before it merged" if adapters else ""
        with made_locally(folder, _LAST) as new:
            tuned = nnx.merge(graph, trained, frozen)
            save_peft(new, base, tuned, base_name=f"{llm_folder}{adapted}")
    return folder


def text_rows(
    config: MTLLM,
    tokenizer: TargetTokenizer,
    english: Texts | Prepared,
    training: Training,
    seed: int,
) -> Rows:
    """Rows of English as the LLM reads it, as many as the steps take, or of all texts if those are
    fewer. Prepared rows are what they are. What stage 1 is evaluated on is not among them.
    ValueError where no text holds anything."""
    num_held = config.adaptation.dev_texts if config.adaptation.training.evaluate_every else 0
    if isinstance(english, Prepared):
        return hold_out_rows(english.rows(), num_held)[0] if num_held else english.rows()
    if num_held:
        english, _ = hold_out_texts(english, num_held)
    length = training.target_length
    empty = len(tokenizer.encode([""])[0])
    order = order_of(english, seed, config.adaptation.mixture)
    records: list[bytes] = []
    counts = Counts()
    for window in packing.windows(len(order)):
        numbers = order[window.start : window.stop]
        texts, cut = encode_cut(
            lambda texts, length: tokenizer.encode(texts, max_length=length),
            [english[i] for i in numbers],
            length,
            len,
        )
        kept = [i for i, ids in enumerate(texts) if len(ids) > empty]
        counts += Counts(len(texts), len(texts) - len(kept), {"target": cut})
        if kept:
            tokens = [{"target": texts[i]} for i in kept]
            made, packed = packing.pack_window(
                tokens, numbers[kept], {"target": length}, packing=training.packing
            )
            records += made
            counts += Counts(rows=packed.rows, tokens=packed.tokens)
        if len(records) >= training.steps * training.batch_rows:
            break
    if not records:
        raise ValueError(f"none of the {counts.texts} English texts holds a token.")
    return packing.in_memory(records, {"target": length}, {"target": tokenizer.pad_id}, counts)


# ---------------------------------------------------------------- masked next-token prediction


def masked_prediction(config: MTLLM, tokenizer: TargetTokenizer, graph: nnx.GraphDef) -> Objective:
    """Cross-entropy of hidden tokens, each predicted from the position before it."""
    dtype = jnp.dtype(config.compute_dtype)
    special, mask_id = jnp.asarray(tokenizer.special_ids, jnp.int32), tokenizer.mask_id()
    vocab_size = tokenizer.vocab_size

    def objective(
        trainable: nnx.State, frozen: nnx.State, batch: dict[str, Array], key: Array
    ) -> Terms:
        llm: Llama = nnx.merge(graph, trainable, frozen)
        ids_BT, segments_BT = batch["target_ids"], batch["target_segments"]
        mask_key, dropout_key = jax.random.split(key)
        is_special_BT = jnp.any(ids_BT[:, :, None] == special[None, None], axis=2)
        may_BT = has_before(segments_BT) & ~is_special_BT
        seen_BT, chosen_BT = masked(config.mntp, ids_BT, may_BT, mask_id, vocab_size, mask_key)
        labels_BT, _ = next_tokens(ids_BT, segments_BT)
        asked_BT = jnp.pad(chosen_BT[:, 1:], ((0, 0), (0, 1)))
        h_BTD = llm.hidden(
            llm.embed(seen_BT, dtype),
            segments_BT,
            causal=False,
            packed=batch["example"].shape[1] > 1,
            dropout_key=dropout_key,
        )
        output = llm.embedding if llm.output is None else llm.output
        return {"loss": cross_entropy_of_rows(h_BTD, weight(output, dtype), labels_BT, asked_BT)}

    return objective


def has_before(segments_BT: Array) -> Array:
    """Where the position before is of the same text, and so a token can be predicted."""
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    return (segments_BT > 0) & (before_BT == segments_BT)


def masked(
    settings: MaskedPrediction,
    ids_BT: Array,
    may_BT: Array,
    mask_id: int,
    vocab_size: int,
    key: Array,
) -> tuple[Array, Array]:
    """Rows with tokens hidden, and which those are, bool [B, T].

    may_BT: the tokens that may be. Of those drawn, most are the mask instead, some another
    token, drawn too, and the others are there to be seen, as in BERT (arXiv 1810.04805).
    """
    chosen_key, kind_key, other_key = jax.random.split(key, 3)
    chosen_BT = may_BT & (jax.random.uniform(chosen_key, ids_BT.shape) < settings.share)
    kind_BT = jax.random.uniform(kind_key, ids_BT.shape)
    other_BT = jax.random.randint(other_key, ids_BT.shape, 0, vocab_size, ids_BT.dtype)
    hidden_BT = jnp.where(kind_BT < settings.blank, mask_id, other_BT)
    is_hidden_BT = chosen_BT & (kind_BT < settings.blank + settings.random)
    return jnp.where(is_hidden_BT, hidden_BT, ids_BT), chosen_BT


# ---------------------------------------------------------------- unsupervised SimCSE


def read_twice(config: MTLLM, tokenizer: TargetTokenizer, graph: nnx.GraphDef) -> Objective:
    """A text read twice, against all other texts of the batch."""
    dtype, causal = jnp.dtype(config.compute_dtype), not config.bidirectional
    settings = config.simcse

    def objective(
        trainable: nnx.State, frozen: nnx.State, batch: dict[str, Array], key: Array
    ) -> Terms:
        llm: Llama = nnx.merge(graph, trainable, frozen)

        def pooled(key: Array) -> Array:
            return llm_pooled(
                llm,
                batch["target_ids"],
                batch["target_segments"],
                batch["example"].shape[1],
                causal=causal,
                dtype=dtype,
                key=key,
                attention_dropout=settings.dropout,
            )

        one_BND, other_BND = map(pooled, jax.random.split(key))
        return {"loss": contrastive(one_BND, other_BND, batch["example"] > 0, settings.temperature)}

    return objective
