"""Llama, Mistral, Qwen2 and Qwen3 folders in and out.

config.json is read as transformers 4 wrote it (`rope_theta`, `rope_scaling`) and as transformers 5
does (`rope_parameters`). It is written with both: a reader that knows only one of them would run
with the default theta and never notice.
"""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
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
from mtllm_jax.models.llama import FAMILIES, Llama, LlamaConfig
from mtllm_jax.ops.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers fills in where a config.json leaves a field out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131_072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def load_llama(
    folder: str | os.PathLike,
    dtype: DTypeLike = jnp.float32,
    *,
    mesh: jax.sharding.Mesh | None = None,
    updates: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]] = {},
    progress: Progress | None = None,
    remat: str = "none",
    unroll_layers: bool = False,
    attention: str = "auto",
) -> Llama:
    """The model of a Hugging Face folder, its parameters in `dtype` whatever they are on disk.

    dtype: int8 quantises linear maps (`models/quantised.py`). mesh: the devices that the parameters
    are laid over; None = the first device. updates: as of `load_into`.
    ValueError, before the weights are read, for a folder, field or tensor that does not fit.
    """
    config = dataclasses.replace(
        _config(folder), remat=remat, unroll_layers=unroll_layers, attention=attention
    )
    module, tensors, table, options = _to_fill(config, folder)
    return load_into(
        module, tensors, table, dtype, mesh=mesh, updates=updates, progress=progress, **options
    )


def check_llama(folder: str | os.PathLike) -> LlamaConfig:
    """Raises what `load_llama` would; returns the model's sizes.

    Reads no weights but tied ones, where a file holds them twice.
    """
    config = _config(folder)
    _to_fill(config, folder)
    return config


def _config(folder: str | os.PathLike) -> LlamaConfig:
    source = read_config(folder, FAMILIES)
    try:
        return config_from_hf(source)
    except ValueError as error:
        raise ValueError(f"{os.fspath(folder)}/config.json: {error}") from None


def _to_fill(
    config: LlamaConfig, folder: str | os.PathLike
) -> tuple[Llama, Tensors, dict[str, str], dict[str, Any]]:
    """The model without values, and what its values are read from and by, found to fit."""
    tensors, table = Tensors(folder), key_table(config)
    aliases = {_EMBEDDING: (_OUTPUT,)} if config.tie_embeddings else {}
    ignored = ("*.rotary_emb.inv_freq",)  # a constant that old Llama checkpoints stored
    options: dict[str, Any] = {"aliases": aliases, "ignored": ignored}
    module = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    match(module, tensors, table, **options)
    check_tied(tensors, aliases)
    return module, tensors, table, options


def stop_ids(folder: str | os.PathLike) -> tuple[int, ...]:
    """The tokens that end a text, by the folder's config.json and generation_config.json."""
    files, found = Files(folder), set()
    for name in ("config.json", "generation_config.json"):
        if files.has(name):
            eos = files.read_json(name).get("eos_token_id")
            found |= {*eos} if isinstance(eos, list) else {eos} - {None}
    return tuple(sorted(found))


def save_llama(
    model: Llama,
    folder: str | os.PathLike,
    tokenizer_files_from: str | os.PathLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> None:
    """A folder that transformers loads as a causal LM.

    dtype: of the tensors; None = that of each parameter. LoRA adapters are to be merged before.
    ValueError if the folder exists and is not empty.
    """
    config = config_to_hf(model.config)
    config["dtype"] = np.dtype(model.embedding[...].dtype if dtype is None else dtype).name
    token_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation_config = {"_from_model_config": True} | {
        name: config[name]
        for name in (*token_ids, "transformers_version")
        if config[name] is not None
    }
    write_folder(
        folder,
        dict(sorted(config.items())),
        export_tensors(model, key_table(model.config), dtype=dtype),
        generation_config=generation_config,
        tokenizer_files_from=tokenizer_files_from,
        progress=progress,
    )


def key_table(config: LlamaConfig) -> dict[str, str]:
    """Where each parameter of ours lies in the checkpoint (see `hf.folder`)."""
    layer = "model.layers.{layer}."
    table = {
        "embedding": _EMBEDDING,
        "norm.scale": "model.norm.weight",
        "layers.attention_norm.scale": layer + "input_layernorm.weight",
        "layers.ffn_norm.scale": layer + "post_attention_layernorm.weight",
    }
    for ours, theirs in {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }.items():
        table[f"layers.{ours}.kernel"] = f"{layer}{theirs}.weight"
        if config.qkv_bias and ours in ("q", "k", "v"):
            table[f"layers.{ours}.bias"] = f"{layer}{theirs}.bias"
    if config.qk_norm:
        table["layers.q_norm.scale"] = layer + "self_attn.q_norm.weight"
        table["layers.k_norm.scale"] = layer + "self_attn.k_norm.weight"
    if not config.tie_embeddings:
        table["output"] = _OUTPUT
    return table


def config_from_hf(source: Mapping[str, Any]) -> LlamaConfig:
    """A config.json as our config. ValueError naming the field that does not fit."""
    family = source["model_type"]
    source = {**_DEFAULTS[family], **source}
    for field in ("attention_bias", "mlp_bias"):
        if source.get(field):
            raise ValueError(f"{field} is {source[field]!r}; only false is supported")
    if (activation := source.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}; only 'silu' is supported")
    num_heads, num_kv_heads, head_width = _heads(source)
    eos = source.get("eos_token_id")
    if not isinstance(tied := source.get("tie_word_embeddings", False), bool | None):
        raise ValueError(f"tie_word_embeddings is {tied!r}; it must be true or false")
    theta, scaling = _rope(source)
    return LlamaConfig(
        vocab_size=_count(source, "vocab_size"),
        width=_count(source, "hidden_size"),
        num_layers=_count(source, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        ffn_width=_count(source, "intermediate_size"),
        rms_eps=_positive(source.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(source.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(source),
        family=family,
        max_positions=_count(source, "max_position_embeddings"),
        bos_id=source.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=source.get("pad_token_id"),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Our config as the config.json that transformers 5 writes, and 4 reads."""
    rope = {"rope_type": "default"} | _scaling_to_hf(config.rope_scaling)
    version = importlib.metadata.version("transformers")
    result: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "eos_token_id": _one_or_list(config.eos_ids),
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "model_type": config.family,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_id,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "transformers_version": version,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "head_dim": config.head_width,
    }
    match config.family:
        case "llama":
            result |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
        case "mistral":
            result |= {"sliding_window": config.sliding_window}
        case "qwen2" | "qwen3":
            result |= {
                "layer_types": ["full_attention"] * config.num_layers,
                "max_window_layers": config.num_layers,
                "sliding_window": None,
                "use_sliding_window": False,
            }
    if config.family == "qwen3":
        result["attention_bias"] = False
    return result


def _heads(source: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key/value heads and their width."""
    width, num_heads = _count(source, "hidden_size"), _count(source, "num_attention_heads")
    if source.get("head_dim") is not None:
        head_width, told = _count(source, "head_dim"), "head_dim"
    elif width % num_heads == 0:
        head_width, told = width // num_heads, "hidden_size / num_attention_heads"
    else:
        raise ValueError(
            f"hidden_size is {width}; without head_dim it must be a multiple of "
            f"num_attention_heads, {num_heads}"
        )
    if head_width % 2:
        raise ValueError(f"{told} is {head_width}; rotary positions need an even number")
    has_kv_heads = source.get("num_key_value_heads") is not None
    num_kv_heads = _count(source, "num_key_value_heads") if has_kv_heads else num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads is {num_heads}; it must be a multiple of num_key_value_heads, "
            f"{num_kv_heads}"
        )
    return num_heads, num_kv_heads, head_width


def _rope(source: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, by the precedence of transformers 5: `rope_scaling` wins if it is set."""
    field = "rope_scaling" if source.get("rope_scaling") else "rope_parameters"
    rope = source.get(field) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{field} is {rope!r}; one set of values for all layers is supported")
    theta = rope.get("rope_theta", source.get("rope_theta", 10_000.0))
    if _positive(theta, "rope_theta") <= 1:
        raise ValueError(f"rope_theta is {theta!r}; it must be a number above 1")
    partial = rope.get("partial_rotary_factor", source.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor is {partial!r}; only 1 is supported")
    return float(theta), _scaling(source, rope, field)


def _scaling(source: Mapping[str, Any], rope: Mapping[str, Any], field: str) -> RopeScaling | None:
    """What `rope`, the value of `field`, asks for beside theta."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise ValueError(f"{field}.rope_type is {kind!r}; allowed: {', '.join(_ROPE_TYPES)}")
    if kind == "default":
        return None

    def number(name: str, default: float | None = None) -> float:
        found = rope.get(name)
        return _positive(default if found is None else found, f"{field}.{name}")

    factor = number("factor")
    if kind == "linear":
        return LinearScaling(factor)
    original = "original_max_position_embeddings"
    default = rope.get(original, source["max_position_embeddings"])
    positions = _count({original: source.get(original, default)}, original)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        _check_order(field, "low_freq_factor", low, "high_freq_factor", high)
        return Llama3Scaling(factor, low, high, positions)
    slow, fast = number("beta_slow", 1.0), number("beta_fast", 32.0)
    _check_order(field, "beta_slow", slow, "beta_fast", fast)
    if not isinstance(truncate := rope.get("truncate", True), bool):
        raise ValueError(f"{field}.truncate is {truncate!r}; it must be true or false")
    gain = number("attention_factor", _yarn_attention_factor(factor, rope))
    return YarnScaling(factor, positions, gain, fast, slow, truncate)


def _yarn_attention_factor(factor: float, rope: Mapping[str, Any]) -> float:
    """0.1 ln(factor) + 1 as in the paper, or DeepSeek's ratio of two such terms with weights."""

    def magnitude(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weights = [rope[name] for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    if len(weights) < 2:
        return magnitude()
    over, under = (_positive(weight, "mscale or mscale_all_dim") for weight in weights)
    return magnitude(over) / magnitude(under)


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {}
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_positions,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }


def _sliding_window(source: Mapping[str, Any]) -> int | None:
    """Mistral's window. Llama has none; Qwen's differs from layer to layer and is refused."""
    if source["model_type"] == "mistral":
        no_window = source.get("sliding_window") is None
        return None if no_window else _count(source, "sliding_window")
    if source["model_type"] in ("qwen2", "qwen3"):
        if source.get("use_sliding_window"):
            raise ValueError(
                f"use_sliding_window is {source['use_sliding_window']!r}; only false, full "
                "attention in every layer, is supported"
            )
        if other := set(source.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(
                f"layer_types has {', '.join(map(repr, sorted(other)))}; only 'full_attention' "
                "in every layer is supported"
            )
    return None


def _check_order(field: str, low_name: str, low: float, high_name: str, high: float) -> None:
    if low >= high:
        raise ValueError(f"{field}.{low_name} is {low}; it must be below {high_name}, {high}")


def _count(source: Mapping[str, Any], field: str) -> int:
    value = source.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} is {value!r}; it must be a whole number above 0")
    return value


def _positive(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{field} is {value!r}; it must be a number above 0")
    return float(value)


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None
