"""LoRA adapters as PEFT's folders, in and out: adapter_config.json, adapter_model.safetensors.

L layers, I input width, O output width, R rank.

An adapter adds alpha / r · B A to torch's weight [O, I], or alpha / √r with `use_rslora` (arXiv
2312.03732). Its tensors are called after the module they adapt:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    A [R, I], of a causal LM
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    B [O, R]
    base_model.model.layers.0.self_attn.q_proj.lora_A.weight          of an LLM without its output

The last is what LLM2Vec's adapters have. Beside them there may be tensors that take the place of
the model's own: of norms (`modules_to_save`), and of biases (`….q_proj.base_layer.bias`).
"""

import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax.hf.files import Files
from mtllm_jax.hf.folder import (
    Tensors,
    check_fit,
    export_tensors,
    new_folder,
    write_json,
    write_tensors,
)
from mtllm_jax.hf.llama import check_llama, key_table, load_llama
from mtllm_jax.models import lora
from mtllm_jax.models.layers import Linear, LoRAParam
from mtllm_jax.models.llama import Llama, LlamaConfig

_CONFIG, _STEM = "adapter_config.json", "adapter_model"
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Factors:
    """A [R, I] and B [O, R] of one linear map of one layer, by the names of their tensors.

    The update is alpha / rank · B A.
    """

    lora_a: str
    lora_b: str
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter folder that fits its LLM.

    factors: by our name of the linear map, as "q", and by layer; some layers may have none.
    copies: tensors that take a parameter's place, by its path and by layer.
    """

    tensors: Tensors
    dropout: float
    factors: Mapping[str, Mapping[int, Factors]]
    copies: Mapping[str, Mapping[int, str]]

    def sizes(self, name: str) -> set[tuple[int, float]]:
        """(rank, alpha) of a linear map, of which layers may have several."""
        return {(one.rank, one.alpha) for one in self.factors[name].values()}


# ------------------------------------------------------------------ in


def load_merged(
    folder: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    *,
    dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> Llama:
    """The LLM of a folder with the adapters of other folders merged into it, one after the other.

    dtype, options and errors: those of `load_llama` and `merge_peft`. In int8 kernels take what
    the adapters add before they are quantised: a step of theirs is larger than most of it.
    """
    if jnp.dtype(dtype) != jnp.int8:
        llm = load_llama(folder, dtype, **options)
        for adapter_folder in adapters:
            merge_peft(llm, adapter_folder)
        return llm
    config = check_llama(folder)
    fitting = [check_peft(adapter_folder, config) for adapter_folder in adapters]
    updates: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for adapter in fitting:
        for name in adapter.factors:
            factors = _of_all_layers(adapter, name, config)
            updates.setdefault(f"layers.{name}.kernel", []).append(factors)
    llm = load_llama(folder, dtype, updates=updates, **options)
    for adapter in fitting:
        _put_copies(llm, adapter)
    return llm


def merge_peft(llm: Llama, folder: str | os.PathLike) -> None:
    """Add an adapter to the LLM's weights, in place; one call after the other for several.

    The sum is made in float32 and stored in the kernel's dtype and place, whose memory it takes:
    nothing else may hold the LLM's arrays. Layers and maps that the adapter leaves out stay as they
    are. ValueError as from `check_peft`, or for an LLM that has adapters attached.
    """
    adapter = _fitting(llm, folder, to_be_kept=False)
    for name in adapter.factors:
        factors = _of_all_layers(adapter, name, llm.config)
        lora.add(getattr(llm.layers, name), *factors, 1.0, donate=True)
    _put_copies(llm, adapter)


def _of_all_layers(
    adapter: Adapter, name: str, config: LlamaConfig
) -> tuple[np.ndarray, np.ndarray]:
    """A [L, I, R] and B [L, R, O] of a linear map, B times the scale; 0 where there are none."""
    layers = adapter.factors[name]
    # Rank and scale may differ from layer to layer: zeros fill up, and B takes the scale.
    rank = max(one.rank for one in layers.values())
    any_one = next(iter(layers.values()))
    size_in = adapter.tensors.shape(any_one.lora_a)[1]
    size_out = adapter.tensors.shape(any_one.lora_b)[0]
    a_LIR = np.zeros((config.num_layers, size_in, rank), np.float32)
    b_LRO = np.zeros((config.num_layers, rank, size_out), np.float32)
    for layer, one in layers.items():
        a_LIR[layer, :, : one.rank] = _transposed(adapter.tensors, one.lora_a)
        b_RO = _transposed(adapter.tensors, one.lora_b)
        b_LRO[layer, : one.rank] = one.alpha / one.rank * b_RO
    return a_LIR, b_LRO


def _put_copies(llm: Llama, adapter: Adapter) -> None:
    """Put the tensors of an adapter that take a parameter's place there."""
    for path, names in adapter.copies.items():
        variable = _at(llm, path)
        for layer, tensor in names.items():
            value = jnp.asarray(adapter.tensors.read(tensor), variable.dtype)
            is_stacked = variable.ndim > value.ndim
            variable[...] = variable[...].at[layer].set(value) if is_stacked else value


def attach_peft(
    llm: Llama, folder: str | os.PathLike, *, rngs: nnx.Rngs, dropout: float | None = None
) -> None:
    """Put an adapter on the LLM, in place and in float32, to be trained further.

    Where the adapter has a linear map in some layers alone, it begins in the others as a fresh one
    does: A from `rngs`, B zero. dropout: None = the adapter's own. ValueError as from `check_peft`,
    or for an LLM that has adapters attached.
    """
    adapter = _fitting(llm, folder, to_be_kept=True)
    rate = adapter.dropout if dropout is None else dropout
    for name, layers in adapter.factors.items():
        ((rank, alpha),) = adapter.sizes(name)
        lora.attach(llm, rank=rank, alpha=alpha, dropout=rate, targets=(name,), rngs=rngs)
        lora_a, lora_b = _lora_of(getattr(llm.layers, name))
        a_LIR, b_LRO = np.array(lora_a[...]), np.array(lora_b[...])
        for layer, one in layers.items():
            a_LIR[layer] = _transposed(adapter.tensors, one.lora_a)
            b_LRO[layer] = _transposed(adapter.tensors, one.lora_b)
        lora_a[...], lora_b[...] = jnp.asarray(a_LIR), jnp.asarray(b_LRO)


def check_peft(
    folder: str | os.PathLike, config: LlamaConfig, *, to_be_kept: bool = False
) -> Adapter:
    """The adapter of a folder, local or remote, found to fit an LLM; reads no weights.

    to_be_kept: for `attach_peft`, else for `merge_peft`. ValueError names the field or the tensor
    that does not fit: another kind of adapter, missing, unexpected or misshapen tensors, whole
    copies of other modules than norms, PyTorch's own format. One that is to be kept may have no
    copies at all, and for each linear map one rank and one alpha over all layers.
    """
    files = Files(folder)
    settings = _settings(files)
    tensors = _tensors(files)
    names = tensors.keys()
    adapter, shapes = _expected(settings, tensors, config)
    check_fit(
        tensors.folder,
        _CONFIG,
        missing=[name for name in shapes if name not in names],
        misshapen=[
            f"{name} is {list(tensors.shape(name))}, by the configs {list(shape)}"
            for name, shape in shapes.items()
            if name in names and tensors.shape(name) != shape
        ],
        unexpected=[name for name in names if name not in shapes],
    )
    for name in names:
        tensors.check_dtype(name)
    if not adapter.factors:
        raise ValueError(f"{files.path(_CONFIG)}: target_modules names no linear map of the LLM")
    if to_be_kept:
        _check_kept(adapter, files)
    return adapter


def _fitting(llm: Llama, folder: str | os.PathLike, *, to_be_kept: bool) -> Adapter:
    if jax.tree.leaves(nnx.state(llm, LoRAParam)):
        raise ValueError(f"{folder}: the LLM has adapters already; merge them first")
    return check_peft(folder, llm.config, to_be_kept=to_be_kept)


def _check_kept(adapter: Adapter, files: Files) -> None:
    if adapter.copies:
        tensor = next(iter(next(iter(adapter.copies.values())).values()))
        raise ValueError(
            f"{files.folder} has a tensor that takes the place of the model's own, {tensor}; such "
            "an adapter can be merged, but not be trained further"
        )
    for name in adapter.factors:
        if len(sizes := adapter.sizes(name)) > 1:
            raise ValueError(
                f"{files.path(_CONFIG)}: (rank, alpha) of {name} differs from layer to layer, "
                f"{sorted(sizes)}; such an adapter can be merged, but not be trained further"
            )


def _tensors(files: Files) -> Tensors:
    weights, pickled = f"{_STEM}.safetensors", f"{_STEM}.bin"
    if files.has(pickled) and not files.has(weights):
        raise ValueError(
            f"{files.folder} has its weights in PyTorch's own format, which is not read; convert "
            'them once, with PyTorch: python -c "import torch, safetensors.torch as s; '
            f"s.save_file({{k: v.contiguous() for k, v in torch.load('{files.path(pickled)}', "
            f"weights_only=True).items()}}, '{files.path(weights)}')\""
        )
    return Tensors(files.folder, _STEM)


def _expected(
    settings: Mapping[str, Any], tensors: Tensors, config: LlamaConfig
) -> tuple[Adapter, dict[str, tuple[int, ...]]]:
    """The adapter as its config has it, and the shapes of its tensors by their names."""
    names = set(tensors.keys())
    has_output = any(name.startswith(f"{_PREFIX}model.") for name in names)
    middle = ".default" if any(".lora_A.default." in name for name in names) else ""
    factors: dict[str, dict[int, Factors]] = {}
    copies: dict[str, dict[int, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer, module, shape in _modules(config):
        module = module if has_output else module.removeprefix("model.")
        stem = _PREFIX + module
        *_, name, kind = f"llm.{path}".split(".")
        lora_a, lora_b = (f"{stem}.lora_{x}{middle}.weight" for x in "AB")
        is_adapted = kind in ("kernel", "bias") and _is_target(
            settings, module, layer, default=lora_a in names or lora_b in names
        )
        copy = None
        if kind == "kernel" and is_adapted:
            one = Factors(lora_a, lora_b, *_rank_and_alpha(settings, module))
            factors.setdefault(name, {})[layer] = one
            shapes |= {lora_a: (one.rank, shape[0]), lora_b: (shape[1], one.rank)}
        elif kind == "bias" and settings["bias"] == "all" and not is_adapted:
            copy = f"{stem}.bias"
        elif kind == "bias" and settings["bias"] != "none" and is_adapted:
            copy = f"{stem}.base_layer.bias"
        elif kind == "scale" and module.endswith(tuple(settings["modules_to_save"])):
            copy = f"{stem}.weight"
        if copy:
            copies.setdefault(path, {})[layer] = copy
            shapes[copy] = shape
    return Adapter(tensors, settings["lora_dropout"], factors, copies), shapes


def _modules(config: LlamaConfig) -> Iterator[tuple[str, int, str, tuple[int, ...]]]:
    """Each parameter's path, and for each layer its module in a causal LM and its shape here."""
    llm = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    for path, pattern in key_table(config).items():
        shape = _at(llm, path).shape
        is_stacked = "{layer}" in pattern
        for layer in range(config.num_layers if is_stacked else 1):
            module = pattern.replace("{layer}", str(layer)).rpartition(".")[0]
            yield path, layer, module, shape[1:] if is_stacked else shape


def _transposed(tensors: Tensors, name: str) -> np.ndarray:
    """A factor as it lies here, float32: A [I, R] or B [R, O]."""
    return tensors.read(name).astype(np.float32).T


def _lora_of(linear: Linear) -> tuple[nnx.Param, nnx.Param]:
    assert linear.lora_a is not None and linear.lora_b is not None
    return linear.lora_a, linear.lora_b


def _at(llm: Llama, path: str) -> nnx.Param:
    """The parameter of a path in the key table."""
    found: nnx.Param = functools.reduce(getattr, path.split("."), llm)  # type: ignore[arg-type]
    return found


# ------------------------------------------------------------------ adapter_config.json


def _settings(files: Files) -> dict[str, Any]:
    """adapter_config.json: all of `_FIELDS`. ValueError names the field that is not supported."""
    if not files.has(_CONFIG):
        what = f"has no {_CONFIG}" if files.is_folder() else "is not a folder"
        raise ValueError(f"{files.folder} {what}; expected the folder of a PEFT adapter")
    values = files.read_json(_CONFIG)
    if not isinstance(values, dict):
        raise ValueError(f"{files.path(_CONFIG)} is not a JSON object")
    for field, value in values.items():
        if value and field not in _FIELDS and field not in _WITHOUT_EFFECT:
            raise ValueError(
                f"{files.path(_CONFIG)}: {field} is {value!r}; adapters with it are not supported"
            )
    settings = {}
    for field, (default, is_allowed, allowed) in _FIELDS.items():
        value = values.get(field)
        settings[field] = value = default if value is None else value
        if not is_allowed(value):
            raise ValueError(f"{files.path(_CONFIG)}: {field} is {value!r}; it must be {allowed}")
    return settings


def _is_target(settings: Mapping[str, Any], module: str, layer: int, *, default: bool) -> bool:
    """Whether PEFT would adapt a linear map. default: where the config leaves that open."""
    targets, layers = settings["target_modules"], settings["layers_to_transform"]
    if _is_named(module, settings["exclude_modules"]):
        return False
    if targets is None:
        return default
    if targets == "all-linear":
        return True
    is_named = _is_named(module, targets)
    if isinstance(targets, str) or layers == []:
        return is_named
    return is_named and layer in ([layers] if isinstance(layers, int) else layers)


def _is_named(module: str, names: str | Sequence[str]) -> bool:
    """names: a pattern of whole names, or names and the ends of such."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _rank_and_alpha(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Alpha as in alpha / rank, for rank-stabilised adapters too."""

    def of(field: str, patterns: str) -> Any:
        """The value of the first pattern that the end of the name fits."""
        for pattern, value in settings[patterns].items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return settings[field]

    rank, alpha = of("r", "rank_pattern"), of("lora_alpha", "alpha_pattern")
    return rank, alpha * math.sqrt(rank) if settings["use_rslora"] else float(alpha)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _all(
    items: Any, kind: type[list[Any]] | type[dict[str, Any]], test: Callable[[Any], bool]
) -> bool:
    return isinstance(items, kind) and all(map(test, items))


def _are_names(value: Any) -> bool:
    return _all(value, list, lambda name: isinstance(name, str))


# field → (default, what it may be, the same in words)
_FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "peft_type": (None, lambda x: x == "LORA", "'LORA'"),
    "r": (None, _is_count, "a whole number above 0"),
    "lora_alpha": (None, _is_number, "a number"),
    "use_rslora": (False, lambda x: isinstance(x, bool), "true or false"),
    "rank_pattern": (
        {},
        lambda x: _all(x, dict, _is_pattern) and _all([*x.values()], list, _is_count),
        "whole numbers above 0 by pattern",
    ),
    "alpha_pattern": (
        {},
        lambda x: _all(x, dict, _is_pattern) and _all([*x.values()], list, _is_number),
        "numbers by pattern",
    ),
    "lora_dropout": (0.0, lambda x: _is_number(x) and 0 <= x < 1, "at least 0 and below 1"),
    "target_modules": (
        None,
        lambda x: x is None or _are_names(x) or _is_pattern(x),
        "a list of names, or a pattern",
    ),
    "exclude_modules": ([], lambda x: _are_names(x) or _is_pattern(x), "names, or a pattern"),
    "layers_to_transform": (
        [],
        lambda x: type(x) is int or _all(x, list, lambda n: type(n) is int),
        "a layer, or a list of them",
    ),
    "modules_to_save": (
        [],
        lambda x: _are_names(x) and all(name.endswith("norm") for name in x),
        "a list of norms",
    ),
    "bias": ("none", lambda x: x in ("none", "lora_only", "all"), "none, lora_only or all"),
    # Others take what the factors begin with out of the model's weights, so that the adapter fits
    # none but the changed model.
    "init_lora_weights": (
        True,
        lambda x: isinstance(x, bool) or x in ("gaussian", "eva", "orthogonal"),
        "true, false, 'gaussian', 'eva' or 'orthogonal' (PEFT converts such adapters to plain ones:"
        " save_pretrained(…, path_initial_model_for_weight_conversion=…))",
    ),
}
# What changes nothing of what a trained adapter computes: fan_in_fan_out is about a kind of map
# that these models do not have, the configs of initialisations about how the factors began.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip


# ------------------------------------------------------------------ out


def save_peft(
    folder: str | os.PathLike,
    base: Llama,
    tuned: Llama,
    *,
    base_name: str,
    dtype: DTypeLike | None = None,
) -> None:
    """The adapters attached to `tuned`, as a folder that PEFT puts on the LLM that they adapt.

    base: that LLM; base_name: its folder or its name on the hub. dtype: of the tensors; None = that
    of each parameter. All norms, and the biases of adapted maps, are written too where some of them
    differ from those of `base`.

    An AutoModelForCausalLM takes it by `peft.PeftModel.from_pretrained(llm, folder)`, an AutoModel
    by its own `llm.load_adapter(folder)`.

    The folder appears whole or not at all. ValueError if something stands there, if `tuned` has no
    adapters, or where other weights differ from those of `base` (see `difference_as_lora`).
    """
    table = key_table(base.config)
    adapted = {name: x for name, x in _linears(tuned).items() if x.lora_a is not None}
    if not adapted:
        raise ValueError("the LLM has no adapters to be written")
    changed = _changed(base, tuned)
    norms = {path: _PREFIX + name for path, name in table.items() if path.endswith(".scale")}
    stems = {
        name: _PREFIX + table[f"layers.{name}.kernel"].removesuffix(".weight") for name in adapted
    }
    biases = {
        f"layers.{name}.bias": f"{stem}.base_layer.bias"
        for name, stem in stems.items()
        if adapted[name].bias is not None
    }
    _check_held(changed - norms.keys() - biases.keys(), base)
    written = {
        f"layers.{name}.lora_{x}": f"{stem}.lora_{x.upper()}.weight"
        for name, stem in stems.items()
        for x in "ab"
    }
    config = _adapter_config({_last(stems[name]): x for name, x in adapted.items()}, base_name)
    if not changed.isdisjoint(norms):
        written |= norms
        saved = sorted({_last(name.removesuffix(".weight")) for name in norms.values()})
        config["modules_to_save"] = saved
    if not changed.isdisjoint(biases):
        written |= biases
        config["bias"] = "lora_only"
    parts = nnx.from_flat_state(
        [
            (path, value)
            for path, value in nnx.to_flat_state(nnx.state(tuned))
            if ".".join(map(str, path)) in written
        ]
    )
    tensors = export_tensors(parts, written, dtype=dtype)
    with new_folder(folder) as new:
        write_tensors(new, tensors, _STEM, max_bytes=sys.maxsize)  # PEFT reads no shards
        if new is not None:
            write_json(new / _CONFIG, config)


def difference_as_lora(base: Llama, tuned: Llama, rank: int | None = None) -> tuple[Llama, float]:
    """What training made of an LLM, all of its layers, as adapters on its original weights.

    rank: the largest that a linear map gets; None = what it takes to lose nothing. Adapters of
    `tuned` count as the kernels that they stand for. Norms and biases are those of `tuned`.

    Returns an LLM on the arrays of `base`, and what is lost of the difference of kernels: the
    largest |difference − A B| / |difference| (Frobenius norms) of all maps and layers. ValueError
    for a rank below 1, or where embedding or output differ, which linear maps cannot make up for.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    changed = _changed(base, tuned)
    _check_held({path for path in changed if path in ("embedding", "output")}, base)
    result, most_lost = nnx.clone(base), 0.0
    for name, before in _linears(base).items():
        after = _linears(tuned)[name]
        is_changed = not changed.isdisjoint({f"layers.{name}.kernel", f"layers.{name}.bias"})
        if not is_changed and after.lora_a is None:
            continue
        a_LIR, b_LRO, lost = _low_rank(before, after, rank)
        factors = jnp.asarray(a_LIR), jnp.asarray(b_LRO)
        lora.put(_linears(result)[name], *factors, scale=1.0)
        most_lost = max(most_lost, lost)
    for path in changed:
        if not path.endswith("kernel"):
            _at(result, path).set_value(_at(tuned, path)[...])
    return result, most_lost


def _low_rank(
    before: Linear, after: Linear, rank: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """A [L, I, R] and B [L, R, O] of the difference of two maps, and the most a layer loses."""
    num_layers, size_in, size_out = before.kernel.shape
    full = min(size_in, size_out)
    rank = full if rank is None else min(rank, full)
    a_LIR = np.empty((num_layers, size_in, rank), np.float32)
    b_LRO = np.empty((num_layers, rank, size_out), np.float32)
    most_lost = 0.0
    for layer in range(num_layers):
        difference_IO = _difference(before, after, layer)
        if rank == full:  # the difference itself, times one
            one = np.eye(full, dtype=np.float32)
            factors = (one, difference_IO) if size_in <= size_out else (difference_IO, one)
            a_LIR[layer], b_LRO[layer] = factors
            continue
        # The nearest matrix of a rank, by the largest singular values (Eckart and Young, 1936).
        u_IF, s_F, v_FO = np.linalg.svd(difference_IO, full_matrices=False)
        root_R = np.sqrt(s_F[:rank])
        a_LIR[layer], b_LRO[layer] = u_IF[:, :rank] * root_R, root_R[:, None] * v_FO[:rank]
        if s_F[0]:
            most_lost = max(most_lost, float(np.linalg.norm(s_F[rank:]) / np.linalg.norm(s_F)))
    return a_LIR, b_LRO, most_lost


def _difference(before: Linear, after: Linear, layer: int) -> np.ndarray:
    """What a layer's kernel has become, its adapter included, minus what it was. float32 [I, O]."""
    factors = None if after.lora_a is None else [x[...] for x in _lora_of(after)]
    kernels = before.kernel[...], after.kernel[...]
    return np.asarray(_difference_of(*kernels, factors, after.lora_scale, np.int32(layer)))


@jax.jit
def _difference_of(
    before_LIO: Array, after_LIO: Array, factors: list[Array] | None, scale: Array, layer: Array
) -> Array:
    difference_IO = after_LIO[layer].astype(jnp.float32) - before_LIO[layer].astype(jnp.float32)
    if factors is None:
        return difference_IO
    a_IR, b_RO = (x[layer].astype(jnp.float32) for x in factors)
    return difference_IO + scale * jnp.matmul(a_IR, b_RO, precision=jax.lax.Precision.HIGHEST)


def _changed(base: Llama, tuned: Llama) -> set[str]:
    """The parameters that differ, adapters aside, by their paths."""
    if base.config != tuned.config:
        raise ValueError("the LLMs have different configs; one must be made of the other")
    changed = set()
    for path in key_table(base.config):
        one, other = _at(base, path)[...], _at(tuned, path)[...]
        if one is not other and _differ(one, other):
            changed.add(path)
    return changed


@jax.jit
def _differ(one: Array, other: Array) -> Array:
    return jnp.any(one.astype(jnp.float32) != other.astype(jnp.float32))


def _check_held(paths: Iterable[str], base: Llama) -> None:
    """ValueError for changed parameters that have no place in an adapter."""
    if names := sorted(key_table(base.config)[path] for path in paths):
        raise ValueError(
            f"{names[0]} is not what it was in the original LLM; an adapter's folder holds what "
            "adapters, norms and biases make different, not this"
        )


def _linears(llm: Llama) -> dict[str, Linear]:
    """The linear maps of the layers by our names."""
    paths = [path.split(".") for path in key_table(llm.config)]
    return {path[1]: getattr(llm.layers, path[1]) for path in paths if path[-1] == "kernel"}


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _adapter_config(adapted: Mapping[str, Linear], base_name: str) -> dict[str, Any]:
    """adapter_config.json of the adapters on linear maps, by the maps' names in PyTorch."""
    ranks = {name: int(_lora_of(x)[0].shape[-1]) for name, x in adapted.items()}
    alphas = {name: _short(ranks[name] * x.lora_scale) for name, x in adapted.items()}
    first = next(iter(adapted))
    rank, alpha = ranks[first], alphas[first]
    return {
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": adapted[first].lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "revision": None,
        "target_modules": sorted(adapted),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _short(number: float) -> int | float:
    """Without what rounding left of alpha / R · R, and an int where it is one."""
    number = float(f"{number:.12g}")
    return int(number) if number.is_integer() else number
