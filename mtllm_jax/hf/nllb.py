"""NLLB and M2M100 checkpoints: `M2M100ForConditionalGeneration` folders in and out."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mtllm_jax.hf.files import Files
from mtllm_jax.hf.folder import (
    Tensors,
    check_tied,
    export_tensors,
    load_into,
    match,
    read_config,
    write_folder,
)
from mtllm_jax.hf.tensors import Progress
from mtllm_jax.models.nllb import NLLB, NLLBConfig

_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_heads": "encoder_attention_heads",
    "decoder_heads": "decoder_attention_heads",
    "encoder_ffn": "encoder_ffn_dim",
    "decoder_ffn": "decoder_ffn_dim",
    "scale_embedding": "scale_embedding",
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
}

_MAY_BE_0 = ("decoder_layers", "pad_token_id", "eos_token_id")

# The only values that this model can have: others are another model.
_FIXED = {"activation_function": "relu", "tie_word_embeddings": True}

# What transformers takes for granted where config.json is silent.
_DEFAULTS = _FIXED | {
    "scale_embedding": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}

_BLOCK = {
    "self_attention_norm": "self_attn_layer_norm",
    "self_attention.query": "self_attn.q_proj",
    "self_attention.key": "self_attn.k_proj",
    "self_attention.value": "self_attn.v_proj",
    "self_attention.out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_in": "fc1",
    "ffn_out": "fc2",
}
_CROSS = {
    "cross_attention_norm": "encoder_attn_layer_norm",
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.out": "encoder_attn.out_proj",
}
# The one embedding goes by four names; a file holds one of them or several.
_EMBEDDING = "model.shared.weight"
_ALIASES = {
    _EMBEDDING: (
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    )
}
# Older files hold the computed positions and a bias of zeros.
_IGNORED = ("model.*.embed_positions.weights", "final_logits_bias")


def load_nllb(
    folder: str | os.PathLike,
    *,
    with_decoder: bool = True,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
    remat: str = "none",
    unroll_layers: bool = False,
    attention: str = "auto",
) -> NLLB:
    """The model of a folder, parameters in `dtype`. ValueError tells what does not fit.

    mesh: the devices that the parameters are laid over; None = the first device.
    """
    config = replace(
        config_from_hf(folder), remat=remat, unroll_layers=unroll_layers, attention=attention
    )
    if not with_decoder:
        config = replace(config, decoder_layers=0)
    module, tensors, table, options = _to_fill(config, folder)
    return load_into(module, tensors, table, dtype, mesh=mesh, progress=progress, **options)


def check_nllb(folder: str | os.PathLike) -> NLLBConfig:
    """Raises what `load_nllb` would; returns the model's sizes.

    Reads no weights but the embedding, where a file holds it more than once.
    """
    config = config_from_hf(folder)
    _to_fill(config, folder)
    return config


def _to_fill(
    config: NLLBConfig, folder: str | os.PathLike
) -> tuple[NLLB, Tensors, dict[str, str], dict[str, Any]]:
    """The model without values, and what its values are read from and by, found to fit."""
    tensors, table = Tensors(folder), key_table(config)
    ignored = _IGNORED if config.decoder_layers else (*_IGNORED, "model.decoder.*")
    options: dict[str, Any] = {"aliases": _ALIASES, "ignored": ignored}
    module = nnx.eval_shape(lambda: NLLB(config, nnx.Rngs(0)))
    match(module, tensors, table, **options)
    check_tied(tensors, _ALIASES)
    return module, tensors, table, options


def into_one_language(folder: str | os.PathLike) -> bool:
    """Whether a folder's model is one that translates into a single language, as its
    generation_config.json says by the token that it forces."""
    files, name = Files(folder), "generation_config.json"
    return files.has(name) and files.read_json(name).get("forced_bos_token_id") is not None


def save_nllb(
    model: NLLB,
    folder: str | os.PathLike,
    *,
    into: int | None = None,
    tokenizer_files_from: str | os.PathLike | None = None,
    replace: bool = False,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> None:
    """A folder that transformers loads. See `write_folder`.

    into: the token of the one language that it translates into, if it is one. dtype: of the
    tensors; None = that of each parameter. ValueError for an encoder alone: the format has a
    decoder.
    """
    if not model.config.decoder_layers:
        raise ValueError(f"{folder}: an encoder alone is no M2M100 folder; load its decoder too")
    written = np.dtype(model.embedding_VE[...].dtype if dtype is None else dtype)
    config = config_to_hf(model.config) | {"dtype": written.name}
    special = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    write_folder(
        folder,
        config,
        export_tensors(model, key_table(model.config), dtype=dtype),
        generation_config={name: config[name] for name in special}
        | ({} if into is None else {"forced_bos_token_id": into}),
        tokenizer_files_from=tokenizer_files_from,
        progress=progress,
        replace=replace,
    )


def key_table(config: NLLBConfig) -> dict[str, str]:
    """From our parameters to tensor names (see `hf/folder.py`)."""
    table = {"embedding_VE": _EMBEDDING}
    stacks = {"encoder": _BLOCK} | ({"decoder": _BLOCK | _CROSS} if config.decoder_layers else {})
    for stack, block in stacks.items():
        norms = {f"{stack}_norm": f"model.{stack}.layer_norm"}
        layers = {f"{stack}.{k}": f"model.{stack}.layers.{{layer}}.{v}" for k, v in block.items()}
        for ours, theirs in (layers | norms).items():
            weight = "scale" if ours.endswith("norm") else "kernel"
            table |= {f"{ours}.{weight}": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}
    return table


def config_from_hf(folder: str | os.PathLike) -> NLLBConfig:
    """Sizes from config.json. ValueError names a field that is missing or not supported."""
    return config_from_values(read_config(folder, ("m2m_100",)), f"{folder}/config.json")


def config_from_values(source: Mapping[str, Any], where: str) -> NLLBConfig:
    """The same of a config that was read; `where` begins the message of the ValueError."""
    values: dict[str, Any] = {**_DEFAULTS, **source}
    try:
        _check(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return NLLBConfig(**{ours: values[theirs] for ours, theirs in _FIELDS.items()})


def _check(values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first field that does not fit, in config.json's words."""
    for name, only in (_FIXED | {"decoder_start_token_id": values["eos_token_id"]}).items():
        if values[name] != only:
            raise ValueError(f"{name} is {values[name]!r}; it may be {only!r}")
    for name in _FIELDS.values():
        value, least = values.get(name), 0 if name in _MAY_BE_0 else 1
        if name == "scale_embedding":
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be true or false")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} on")
    width = values["d_model"]
    if width % 2 or width < 4:
        raise ValueError(f"d_model is {width}; it must be even and at least 4")
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if width % values[name]:
            raise ValueError(f"{name} is {values[name]}; it must divide d_model, {width}")


def config_to_hf(config: NLLBConfig) -> dict[str, Any]:
    """The config.json of `M2M100ForConditionalGeneration`."""
    fixed = _FIXED | {
        "architectures": ["M2M100ForConditionalGeneration"],
        "model_type": "m2m_100",
        "is_encoder_decoder": True,
        "bos_token_id": 0,
        "max_position_embeddings": 1024,
        "decoder_start_token_id": config.eos_id,
    }
    return fixed | {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
