"""The default runs' own "pretrained" models: a tiny NLLB and a tiny Llama.

Both end as ordinary Hugging Face folders; from there on nothing knows that they were made here.

B rows, N texts per row, S encoder positions, T decoder positions, E encoder width, V vocabulary.
"""

import collections
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mtllm_jax import distributed
from mtllm_jax.config import MTLLM, SDRRL, MiniNLLB, naming
from mtllm_jax.data.packing import pack
from mtllm_jax.data.tokenise import TargetTokenizer, TranslationTokenizer, translation_tokenizer
from mtllm_jax.data.train_tokenizer import train_llama_tokenizer, train_nllb_tokenizer
from mtllm_jax.hf.files import TOKENIZER_CONFIG, Files, local_files
from mtllm_jax.hf.llama import save_llama
from mtllm_jax.hf.nllb import save_nllb
from mtllm_jax.models.layers import split
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.models.stack import add_noise
from mtllm_jax.objectives import Terms, next_tokens
from mtllm_jax.ops.vocab_loss import cross_entropy, label_places, sampled_vocabulary
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import made_locally
from mtllm_jax.train import Objective, fit

_LISTS_SHOWN = 20  # per language, to the tokenizer

Recipe = TypeVar("Recipe", MTLLM, SDRRL)
Pair = Mapping[str, Any]  # text, its language, the same in English, kind: "name" or "list"


def mini_nllb(
    job: Job[Recipe],
    read_pairs: Callable[[], Sequence[Pair]],
    *,
    both_ways: bool = False,
    legacy_source_order: bool = False,
) -> str:
    """Train the encoder–decoder on names and lists in two languages; returns its folder.

    read_pairs: called where it is not trained yet. both_ways: out of English, too.
    """
    config, seed = job.config.mini_nllb, job.stage_seed("mini_nllb")
    assert config is not None  # the door asks for a folder then
    with job.stage("mini_nllb", f"mini NLLB, X {'↔' if both_ways else '→'} English") as stage:
        folder = os.fspath(stage.path / "model")
        if distributed.by_first(lambda: Files(folder).has("config.json")):
            return folder
        pairs = list(read_pairs())
        languages = [job.config.english, *job.config.languages]
        tokenizer_folder = os.fspath(stage.path / "tokenizer")

        def make_tokenizer() -> None:
            if Files(tokenizer_folder).has(TOKENIZER_CONFIG):
                return
            names = _tokenizer_texts(pairs)
            with (
                naming("mini_nllb.vocab_size"),
                made_locally(tokenizer_folder, TOKENIZER_CONFIG) as new,
            ):
                train_nllb_tokenizer(names, languages, config.vocab_size, new)

        distributed.by_first(make_tokenizer)
        tokenizer = translation_tokenizer(
            local_files(tokenizer_folder), legacy_source_order=legacy_source_order
        )
        texts = _translation_texts(pairs, tokenizer, job.config.english, config, seed, both_ways)
        is_label_V = np.zeros(tokenizer.vocab_size, bool)
        for one in texts:
            is_label_V[one["target"]] = True
        training = config.training
        model = NLLB(
            NLLBConfig(
                vocab_size=tokenizer.vocab_size,
                width=config.width,
                encoder_layers=config.encoder_layers,
                decoder_layers=config.decoder_layers,
                encoder_heads=config.num_heads,
                decoder_heads=config.num_heads,
                encoder_ffn=config.ffn_width,
                decoder_ffn=config.ffn_width,
                unroll_layers=job.config.unroll_layers,
                attention=job.config.attention,
                remat=job.config.remat,
            ),
            nnx.Rngs(seed),
        )
        # The encoder's output norm stays at weight 1 and bias 0, so that its states keep rms 1:
        # a learnt scale could simply grow until the noise below no longer matters.
        graph, fixed, trainable = split(model, nnx.PathContains("encoder_norm"))
        trained = fit(
            stage,
            "mini NLLB",
            training,
            objective=translation(graph, config, is_label_V),
            trainable=trainable,
            frozen=fixed,
            rows=lambda: pack(
                texts,
                {"source": training.source_length, "target": training.target_length},
                {"source": tokenizer.pad_id, "target": tokenizer.pad_id},
                packing=training.packing,
            ),
            mesh=job.mesh,
            seed=seed,
            console=job.console,
            watch=job.watch,
        )
        model = nnx.merge(graph, fixed, trained)
        with made_locally(folder, "config.json") as new:
            into = tokenizer.language_id(job.config.english)
            save_nllb(model, new, into=into, tokenizer_files_from=tokenizer_folder)
    return folder


def _tokenizer_texts(pairs: Sequence[Pair]) -> list[str]:
    """All names, and of lists as few as show what joins them.

    Learnt from many lists, pieces would cross the borders of names in scripts without spaces.
    """
    names = [pair for pair in pairs if pair["kind"] == "name"]
    lists: dict[str, list[Any]] = collections.defaultdict(list)
    for pair in pairs:
        if pair["kind"] == "list" and len(lists[pair["language"]]) < _LISTS_SHOWN:
            lists[pair["language"]].append(pair)
    shown = [*names, *(pair for few in lists.values() for pair in few)]
    return [pair["text"] for pair in shown] + [pair["english"] for pair in shown]


def _translation_texts(
    pairs: Sequence[Pair],
    tokenizer: TranslationTokenizer,
    english: str,
    config: MiniNLLB,
    seed: int,
    both_ways: bool,
) -> list[dict[str, np.ndarray]]:
    """Every pair, into English or both ways, and of the first the wanted share of English →
    English, shuffled."""
    # By the languages of source and target.
    rows_of: dict[tuple[str, str], list[tuple[str, str]]] = collections.defaultdict(list)
    for pair in pairs:
        rows_of[pair["language"], english].append((pair["text"], pair["english"]))
    names = sorted({pair["english"] for pair in pairs})
    num_english = round(len(pairs) * config.english_share / (1 - config.english_share))
    chosen = np.random.default_rng(seed).permutation(np.resize(np.arange(len(names)), num_english))
    rows_of[english, english] += [(names[i], names[i]) for i in chosen]
    if both_ways:
        for pair in pairs:
            rows_of[english, pair["language"]].append((pair["english"], pair["text"]))
    texts = []
    for (code, into), rows in rows_of.items():
        targets = tokenizer.encode_target([row[1] for row in rows], into)
        sources = tokenizer.encode(
            [row[0] for row in rows], code, max_length=config.training.source_length
        )
        texts += [
            {"source": source, "target": target[: config.training.target_length]}
            for source, target in zip(sources, targets, strict=True)
        ]
    return [texts[i] for i in np.random.default_rng(seed + 1).permutation(len(texts))]


def translation(graph: nnx.GraphDef, config: MiniNLLB, is_label_V: np.ndarray) -> Objective:
    """Translation as NLLB learns it, with an encoder that noise makes language-independent [ours].

    The decoder reads a noised encoder and only part of its positions: it must find the meaning
    anywhere, which pulls the languages together in the encoder. The softmax runs over the pieces
    that occur in targets and a sample of the others.
    """
    place_V = label_places(is_label_V)

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        model: NLLB = nnx.merge(graph, frozen, trainable)
        level_key, noise_key, hide_key, sample_key = jax.random.split(key, 4)
        source_BS, target_BT = batch["source_segments"], batch["target_segments"]
        # A level for each text, from untouched to full: the clean ones teach translation early on,
        # the noisy ones keep it from resting on a single position or language.
        num_texts = batch["example"].shape[1]
        level_BN = jax.random.uniform(level_key, (source_BS.shape[0], num_texts + 1))
        level_BS = jnp.take_along_axis(level_BN, source_BS, axis=1)
        memory_BSE = model.encode(batch["source_ids"], source_BS)
        noised_BSE = add_noise(
            memory_BSE,
            source_BS,
            num_texts,
            config.noise_position,
            config.noise_text,
            noise_key,
        )
        memory_BSE += level_BS[:, :, None] * (noised_BSE - memory_BSE)
        hidden_BS = jax.random.uniform(hide_key, source_BS.shape) < (
            config.memory_dropout * level_BS
        )
        seen_BS = jnp.where(hidden_BS, 0, source_BS)
        inputs_BT = decoder_inputs(batch["target_ids"], target_BT, model.config.eos_id)
        h_BTE = model.decode(inputs_BT, target_BT, memory_BSE, seen_BS)
        candidates_C, bias_C = sampled_vocabulary(is_label_V, config.negatives, sample_key)
        loss = cross_entropy(
            h_BTE.reshape(-1, h_BTE.shape[-1]),
            model.embedding_VE[...][candidates_C],
            place_V[batch["target_ids"]].reshape(-1),
            (target_BT > 0).reshape(-1),
            bias_V=bias_C,
        )
        return {"loss": loss}

    return objective


def decoder_inputs(labels_BT: Array, segments_BT: Array, eos_id: int) -> Array:
    """Labels moved one place to the right within each text, </s> in front (M2M100). [B, T]."""
    before_BT = jnp.pad(labels_BT[:, :-1], ((0, 0), (1, 0)))
    same_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0))) == segments_BT
    return jnp.where(same_BT, before_BT, eos_id)


def mini_llama(job: Job[Recipe], title: str, read_texts: Callable[[], Sequence[str]]) -> str:
    """Train the causal LLM on texts; returns its folder. read_texts: as in `mini_nllb`."""
    config, seed = job.config.mini_llama, job.stage_seed("mini_llama")
    assert config is not None  # the door asks for a folder then
    with job.stage("mini_llama", title) as stage:
        folder = os.fspath(stage.path / "model")
        if distributed.by_first(lambda: Files(folder).has("config.json")):
            return folder
        texts = list(read_texts())
        tokenizer_folder = os.fspath(stage.path / "tokenizer")

        def make_tokenizer() -> None:
            if Files(tokenizer_folder).has(TOKENIZER_CONFIG):
                return
            with (
                naming("mini_llama.vocab_size"),
                made_locally(tokenizer_folder, TOKENIZER_CONFIG) as new,
            ):
                train_llama_tokenizer(texts, config.vocab_size, new)

        distributed.by_first(make_tokenizer)
        tokenizer = TargetTokenizer(local_files(tokenizer_folder))
        training = config.training
        eos = np.array([tokenizer.eos_id], np.int32)
        tokens = tokenizer.encode(texts, max_length=training.target_length - 1)
        model = Llama(
            LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                width=config.width,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_width=config.width // config.num_heads,
                ffn_width=config.ffn_width,
                unroll_layers=job.config.unroll_layers,
                attention=job.config.attention,
                remat=job.config.remat,
            ),
            nnx.Rngs(seed),
        )
        graph, trainable = nnx.split(model)
        trained = fit(
            stage,
            "mini Llama",
            training,
            objective=language_modelling(graph),
            trainable=trainable,
            frozen={},
            rows=lambda: pack(
                [{"target": np.concatenate([one, eos])} for one in tokens],
                {"target": training.target_length},
                {"target": tokenizer.pad_id},
                packing=training.packing,
            ),
            mesh=job.mesh,
            seed=seed,
            console=job.console,
            watch=job.watch,
        )
        with made_locally(folder, "config.json") as new:
            save_llama(nnx.merge(graph, trained), new, tokenizer_files_from=tokenizer_folder)
    return folder


def language_modelling(graph: nnx.GraphDef) -> Objective:
    """Causal next-token prediction within each packed text."""

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        model: Llama = nnx.merge(graph, trainable)
        ids_BT, segments_BT = batch["target_ids"], batch["target_segments"]
        labels_BT, valid_BT = next_tokens(ids_BT, segments_BT)
        h_BTD = model.hidden(model.embed(ids_BT), segments_BT, causal=True)
        loss = cross_entropy(
            h_BTD.reshape(-1, h_BTD.shape[-1]),
            model.output_kernel(),
            labels_BT.reshape(-1),
            valid_BT.reshape(-1),
        )
        return {"loss": loss}

    return objective
