"""BERT, XLM-R and RoBERTa checkpoints, the encoder alone: folders in and out."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace as with_changes
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtllm_jax.hf.folder import (
    Tensors,
    export_tensors,
    load_into,
    match,
    read_config,
    write_folder,
)
from mtllm_jax.hf.tensors import Progress
from mtllm_jax.models.bert import FAMILIES, Bert, BertConfig

_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "num_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
    "pad_id": "pad_token_id",
    "family": "model_type",
}
_TYPES = {"eps": (float, int), "activation": (str,), "family": (str,)}  # others: int

# The only values that this model can have: others are another model.
_FIXED = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}

# What transformers takes for granted where config.json is silent.
_DEFAULTS = _FIXED | {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
_PAD_IDS = {"bert": 0, "xlm-roberta": 1, "roberta": 1}
_ARCHITECTURES = {"bert": "BertModel", "xlm-roberta": "XLMRobertaModel", "roberta": "RobertaModel"}

_EMBEDDINGS = {
    "embedding_VE": "embeddings.word_embeddings.weight",
    "position_PE": "embeddings.position_embeddings.weight",
    "type_YE": "embeddings.token_type_embeddings.weight",
    "embedding_norm.scale": "embeddings.LayerNorm.weight",
    "embedding_norm.bias": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
# A model with a head has its encoder's tensors behind one of these.
_PREFIXES = ("bert.", "roberta.")
# Heads, and positions that older files hold though they are but 0, 1, 2, …
_IGNORED = ("pooler.*", "embeddings.position_ids")
_HEADS = ("cls.*", "lm_head.*")
# What layer norms are called in files that were converted from TensorFlow.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def load_bert(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
    remat: str = "none",
    unroll_layers: bool = False,
    attention: str = "auto",
) -> Bert:
    """The encoder of a folder, parameters in `dtype`. ValueError tells what does not fit.

    mesh: the devices that the parameters are laid over; None = the first device.
    """
    config = with_changes(
        config_from_hf(folder), remat=remat, unroll_layers=unroll_layers, attention=attention
    )
    tensors = Tensors(folder)
    table = key_table(config, prefix_of(tensors))
    options = _options(config, prefix_of(tensors))
    return load_into(
        _abstract(config), tensors, table, dtype, mesh=mesh, progress=progress, **options
    )


def check_bert(folder: str | os.PathLike) -> BertConfig:
    """Raises what `load_bert` would, without reading any weight; returns the model's sizes."""
    config, tensors = config_from_hf(folder), Tensors(folder)
    table = key_table(config, prefix_of(tensors))
    match(_abstract(config), tensors, table, **_options(config, prefix_of(tensors)))
    return config


def save_bert(
    model: Bert,
    folder: str | os.PathLike,
    *,
    tokenizer_files_from: str | os.PathLike | None = None,
    replace: bool = False,
) -> None:
    """A folder that transformers loads, in the dtype of the parameters. See `write_folder`."""
    write_folder(
        folder,
        config_to_hf(model.config) | {"dtype": model.embedding_VE[...].dtype.name},
        export_tensors(model, key_table(model.config)),
        tokenizer_files_from=tokenizer_files_from,
        replace=replace,
    )


def key_table(config: BertConfig, prefix: str = "") -> dict[str, str]:
    """From our parameters to tensor names (see `hf/folder.py`), all of them behind `prefix`."""
    table = {ours: prefix + theirs for ours, theirs in _EMBEDDINGS.items()}
    for ours, theirs in _LAYER.items():
        weight = "scale" if ours.endswith("norm") else "kernel"
        name = f"{prefix}encoder.layer.{{layer}}.{theirs}"
        table[f"layers.{ours}.{weight}"] = f"{name}.weight"
        table[f"layers.{ours}.bias"] = f"{name}.bias"
    return table


def prefix_of(tensors: Tensors) -> str:
    """What stands before the encoder's names in a folder: "bert.", "roberta." or nothing."""
    keys = tensors.keys()
    return next((p for p in _PREFIXES if any(key.startswith(p) for key in keys)), "")


def _abstract(config: BertConfig) -> Bert:
    return nnx.eval_shape(lambda: Bert(config, nnx.Rngs(0)))


def _options(config: BertConfig, prefix: str) -> dict[str, Any]:
    aliases: dict[str, tuple[str, ...]] = {}
    for pattern in key_table(config, prefix).values():
        for new, old in _OLD_NAMES.items():
            if pattern.endswith(new):
                names = (pattern.replace("{layer}", str(i)) for i in range(config.num_layers))
                aliases |= {name: (name.replace(new, old),) for name in names}
    return {"aliases": aliases, "ignored": (*(prefix + name for name in _IGNORED), *_HEADS)}


def config_from_hf(folder: str | os.PathLike) -> BertConfig:
    """Sizes from config.json. ValueError names a field that is missing or not supported."""
    return config_from_values(read_config(folder, FAMILIES), f"{folder}/config.json")


def config_from_values(source: Mapping[str, Any], where: str) -> BertConfig:
    """The same of a config that was read; `where` begins the message of the ValueError."""
    values: dict[str, Any] = {**_DEFAULTS, **source}
    values.setdefault("pad_token_id", _PAD_IDS[values["model_type"]])
    for name, only in _FIXED.items():
        if values[name] != only:
            raise ValueError(f"{where}: {name} is {values[name]!r}; it may be {only!r}")
    for ours, name in _FIELDS.items():
        kinds = _TYPES.get(ours, (int,))
        if type(values.get(name)) not in kinds:
            found = values.get(name)
            raise ValueError(f"{where}: {name} is {found!r}; it must be {kinds[0].__name__}")
    eps = values["layer_norm_eps"]
    if not 0 < eps < math.inf:
        raise ValueError(f"{where}: layer_norm_eps is {eps!r}; it must be a number above 0")
    try:
        return BertConfig(**{ours: values[theirs] for ours, theirs in _FIELDS.items()})
    except ValueError as error:
        # Told in the words of the file.
        told = re.sub(r"\w+", lambda word: _FIELDS.get(word[0], word[0]), str(error))
        raise ValueError(f"{where}: {told}") from None


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """The config.json of `BertModel` and its siblings."""
    named = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    return {"architectures": [_ARCHITECTURES[config.family]]} | _FIXED | named
