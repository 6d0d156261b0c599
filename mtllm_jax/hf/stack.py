"""Stacks as Hugging Face folders that PyTorch loads with the code inside, and back.

config.json has the model_type `mtllm`, the configs of both models (`encoder_config`, `llm_config`)
and the fields of `torch_code/configuration_mtllm.py`. The tensors, with the names that transformers
has for M2M100Encoder or BertModel and for LlamaModel (MistralModel, …):

    encoder.*                    embed_tokens, layers.0.… , layer_norm; BERT: embeddings, encoder
    up_proj.weight, .bias        the bridge, [D, E] and [D]; where it reads W positions as one,
                                 [D, W · E]; behind bridge_in, [D, I]
    bridge_in.weight, .bias      the first map of a bridge of two, [I, W · E] and [I]
    llm.*                        embed_tokens, layers.0.… , norm; there is no output layer
    score.weight                 the head, if there is one: [labels, D], or [1, D] for choices

Adapters that are kept stand beside what they adapt: `….q_proj.base_layer.weight`, `.lora_A.weight`
[R, in] and `.lora_B.weight` [out, R], with R and alpha of each map in the config's `lora`.

The authors of MT-LLM release such a stack too, as model_type `nllb-llm2vec`: an NLLB encoder,
`up_proj` and a Llama that reads both ways. It is read by what its tensors are rather than by what
they are called: the encoder's prefix is what stands before `layers.0.fc1.weight`, the LLM's what
stands before `layers.0.mlp.gate_proj.weight`; the configs are the two fields of a model_type that
an encoder or an LLM has.

D LLM width, E encoder width, W the bridge's stride, I its inner width, R LoRA rank.
"""

import collections
import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from huggingface_hub.errors import StrictDataclassError
from jax.typing import DTypeLike

from mtllm_jax import sharding
from mtllm_jax.data import tokenise
from mtllm_jax.hf import bert, llama, nllb
from mtllm_jax.hf.files import TOKENIZER_CONFIG, local_files
from mtllm_jax.hf.folder import (
    OutTensor,
    Tensors,
    check_unquantised,
    copy_tokenizer_files,
    export_tensors,
    load_into,
    match,
    new_folder,
    read_config,
    write_json,
    write_tensors,
)
from mtllm_jax.hf.tensors import SHARD_BYTES, Progress
from mtllm_jax.hf.tokenizer_config import readable_config
from mtllm_jax.languages import ENGLISH
from mtllm_jax.models import lora as adapters
from mtllm_jax.models.bert import FAMILIES as BERT_FAMILIES
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.bridge import Bridge
from mtllm_jax.models.layers import Linear, param
from mtllm_jax.models.llama import FAMILIES as LLM_FAMILIES
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.models.stack import Stack, classification_head
from mtllm_jax.tasks import multiple_choice

LLM_TOKENIZER = "llm_tokenizer"  # sub-folder with the LLM's own tokenizer

_OURS, _AUTHORS = MODEL_TYPES = ("mtllm", "nllb-llm2vec")
_AUTHORS_MAX_LENGTH = 512  # [code]
_CLASSES = {
    "none": ("AutoModel", "MTLLMModel"),
    "classification": ("AutoModelForSequenceClassification", "MTLLMForSequenceClassification"),
    "multiple_choice": ("AutoModelForMultipleChoice", "MTLLMForMultipleChoice"),
}
_TORCH_CODE = Path(__file__).parent / "torch_code"
_CODE = (
    _TORCH_CODE / "configuration_mtllm.py",
    _TORCH_CODE / "modeling_mtllm.py",
    Path(multiple_choice.__file__),  # the modelling file imports it
)


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """What a folder's config.json says.

    lora: (R, alpha) of the LLM's maps with adapters of their own, by their names here, as "q". The
    rest is as in `LoadedStack`.
    """

    encoder: NLLBConfig | BertConfig
    llm: LlamaConfig
    labels: tuple[str, ...]
    kind: str
    bidirectional: bool
    max_length: int
    languages: tuple[str, ...]
    legacy_source_order: bool
    lora: Mapping[str, tuple[int, float]]
    bridge_hidden: int = 0  # as in `Bridge`
    bridge_stride: int = 1


@dataclasses.dataclass(frozen=True)
class LoadedStack:
    """A stack with its head, and what one has to know to use them.

    labels: of a classification, in the order of their ids. kind, of the head: "none",
    "classification" or "multiple_choice". bidirectional: how the LLM reads. max_length: tokens of
    the longest text. languages: codes that texts may be in; empty where the folder says nothing.
    legacy_source_order: NLLB's, `text </s> [language]`.
    """

    stack: Stack
    head: Linear | None
    labels: tuple[str, ...]
    kind: str
    bidirectional: bool
    max_length: int
    languages: tuple[str, ...]
    legacy_source_order: bool


class _Parts(nnx.Module):
    """All that a folder stores."""

    def __init__(self, encoder: NLLB | Bert, bridge: Bridge, llm: Llama, head: Linear | None):
        self.encoder = encoder
        self.bridge = bridge
        self.llm = llm
        self.head = nnx.data(head)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Where the parts lie: what stands before their tensors. No head: None."""

    encoder: str = "encoder."
    bridge: str = "up_proj"
    llm: str = "llm."
    head: str | None = "score"


# ------------------------------------------------------------------ out


def save_stack(
    folder: str | os.PathLike,
    stack: Stack,
    *,
    head: Linear | None = None,
    labels: Sequence[str] = (),
    kind: str = "none",
    bidirectional: bool,
    max_length: int,
    languages: Sequence[str],
    encoder_tokenizer_from: str | os.PathLike,
    llm_tokenizer_from: str | os.PathLike,
    legacy_source_order: bool = False,
    lora: str = "merged",
    card: str | None = None,
    dtype: DTypeLike | None = None,
    replace: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """A folder that transformers loads with `trust_remote_code`, and `load_stack` here.

    stack: of an NLLB the encoder alone is written, of the LLM all but its output layer. What is not
    named here is as in `LoadedStack`. encoder_tokenizer_from, llm_tokenizer_from: folders, local or
    remote, whose tokenizers are copied, the LLM's into `llm_tokenizer/`. lora: the LLM's adapters
    are "merged" into its weights or "kept" beside them. card: README.md. dtype: of the tensors;
    None = that of each parameter. replace, max_shard_bytes: as in `write_folder`. ValueError for
    what does not go together, or for a tokenizer that lacks one of the languages.
    """
    _check(stack, head, labels, kind, lora)
    encoder = _encoder_of(stack, max_length)
    if not languages:
        raise ValueError("languages are empty; they are the codes of what texts may be in")
    config = StackConfig(
        encoder=encoder,
        llm=dataclasses.replace(stack.llm.config, tie_embeddings=True),
        labels=tuple(labels),
        kind=kind,
        bidirectional=bidirectional,
        max_length=max_length,
        languages=tuple(languages),
        legacy_source_order=legacy_source_order,
        lora=_ranks(stack.llm) if lora == "kept" else {},
        bridge_hidden=0 if stack.bridge.inner is None else stack.bridge.inner.kernel.shape[1],
        bridge_stride=stack.bridge.stride,
    )
    source_files, llm_files = local_files(encoder_tokenizer_from), local_files(llm_tokenizer_from)
    tokenise.TargetTokenizer(llm_files)  # raises for what is none
    source = tokenise.source_tokenizer(source_files, legacy_source_order=legacy_source_order)
    language_ids = None
    if isinstance(source, tokenise.TranslationTokenizer):
        language_ids = [source.language_id(code) for code in languages]
    settings: dict[str, Any] = {}
    if isinstance(source, tokenise.NllbTokenizer):
        # A language that it lacks would be <unk> before every text, silently.
        first = ENGLISH if ENGLISH in languages else languages[0]
        settings = {"src_lang": first, "legacy_behaviour": False}
    tensors = export_tensors(
        _stored_parts(stack, head),
        _table(config, _Names()),
        merge_lora=lora == "merged",
        dtype=dtype,
    )
    with new_folder(folder, replace=replace) as new:
        write_tensors(new, tensors, max_bytes=max_shard_bytes, progress=progress)
        if new is None:
            return
        told = {"dtype": _common_dtype(tensors), "language_ids": language_ids}
        write_json(new / "config.json", dict(sorted((_to_hf(config) | told).items())))
        for path in _CODE:
            shutil.copyfile(path, new / path.name)
        _copy_tokenizer(source_files, new, settings)
        (new / LLM_TOKENIZER).mkdir()
        _copy_tokenizer(llm_files, new / LLM_TOKENIZER, {})
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")


def _check(stack: Stack, head: Linear | None, labels: Sequence[str], kind: str, lora: str) -> None:
    for name, value, allowed in (
        ("kind", kind, tuple(_CLASSES)),
        ("lora", lora, ("merged", "kept")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it may be {', '.join(allowed)}")
    if lora == "kept" and not _ranks(stack.llm):
        raise ValueError("lora is 'kept', but the LLM has no adapters")
    if kind == "multiple_choice" and stack.bridge.stride > 1:
        raise ValueError("kind is 'multiple_choice', but the bridge shortens texts")
    if (head is None) != (kind == "none"):
        raise ValueError(f"kind is {kind!r}, but there is {'no' if head is None else 'a'} head")
    if bool(labels) != (kind == "classification"):
        raise ValueError(f"labels are {list(labels)}, but kind is {kind!r}")
    if head is not None:
        found, wanted = list(head.kernel.shape), [stack.llm.config.width, len(labels) or 1]
        if found != wanted or head.bias is not None:
            bias = "" if head.bias is None else " with a bias"
            raise ValueError(f"head is {found}{bias}; it must be {wanted} without a bias")


def _encoder_of(stack: Stack, max_length: int) -> NLLBConfig | BertConfig:
    """The encoder's config, without a decoder."""
    encoder = stack.encoder
    if isinstance(encoder, NLLB):
        return dataclasses.replace(encoder.config, decoder_layers=0)
    if not isinstance(encoder, Bert):
        raise ValueError(f"the encoder is a {type(encoder).__name__}; it may be NLLB or Bert")
    if max_length > (most := encoder.config.max_positions):
        raise ValueError(f"max_length is {max_length}; the encoder has positions for {most} tokens")
    return encoder.config


def _stored_parts(stack: Stack, head: Linear | None) -> _Parts:
    """The stack's own arrays, without those that a folder does not store."""

    def same(module: Any) -> Any:
        """Another module of the same variables: it can lose one without the stack losing it."""
        return nnx.merge(*nnx.split(module))

    encoder, llm = same(stack.encoder), same(stack.llm)
    if isinstance(encoder, NLLB):
        encoder.decoder = encoder.decoder_norm = nnx.data(None)
    llm.output = nnx.data(None)
    return _Parts(encoder, stack.bridge, llm, head)


def _ranks(llm: Llama) -> dict[str, tuple[int, float]]:
    """(R, alpha) of each map with an adapter."""
    found = {}
    for name in _projections(llm.config):
        linear = getattr(llm.layers, name)
        if linear.lora_a is not None:
            rank = linear.lora_a.shape[-1]
            found[name] = rank, linear.lora_scale * rank
    return found


def _common_dtype(tensors: Sequence[OutTensor]) -> str:
    """The dtype of most numbers: some readers cast all tensors to the one in config.json."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        counts[tensor.dtype.name] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def _to_hf(config: StackConfig) -> dict[str, Any]:
    if isinstance(config.encoder, NLLBConfig):
        encoder = nllb.config_to_hf(config.encoder)
    else:
        encoder = bert.config_to_hf(config.encoder)
    names = _projections(config.llm)
    lora = {names[name]: {"r": r, "alpha": alpha} for name, (r, alpha) in config.lora.items()}
    result: dict[str, Any] = {
        "architectures": [_CLASSES[config.kind][1]],
        "auto_map": {
            "AutoConfig": "configuration_mtllm.MTLLMConfig",
            **{auto: f"modeling_mtllm.{name}" for auto, name in _CLASSES.values()},
        },
        "bidirectional": config.bidirectional,
        "bridge_hidden": config.bridge_hidden,
        "bridge_stride": config.bridge_stride,
        "encoder_config": _inner(encoder),
        "head": config.kind,
        "language_at_end": config.legacy_source_order,
        "languages": list(config.languages),
        "llm_config": _inner(llama.config_to_hf(config.llm)),
        "lora": lora or None,
        "max_source_length": config.max_length,
        "model_type": _OURS,
        "transformers_version": importlib.metadata.version("transformers"),
    }
    if config.labels:
        result["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        result["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return result


def _inner(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without what is said of the whole."""
    of_the_whole = ("architectures", "transformers_version")
    return {name: value for name, value in sorted(config.items()) if name not in of_the_whole}


def _copy_tokenizer(source: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """A tokenizer that is recognised without the config.json of its model beside it."""
    copy_tokenizer_files(source, folder)
    path = folder / TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "tokenizer_class" not in config:
        # Files of long ago: transformers tells what they are and writes them as it does now.
        from transformers import AutoTokenizer

        with tokenise.quiet():
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
        config = readable_config(json.loads(path.read_text(encoding="utf-8")))
    write_json(path, {**config, **settings})


# ------------------------------------------------------------------ in


def load_stack(
    folder: str | os.PathLike,
    dtype: DTypeLike = jnp.float32,
    *,
    mesh: jax.sharding.Mesh | None = None,
    remat: str = "none",
    unroll_layers: bool = False,
    attention: str = "auto",
) -> LoadedStack:
    """The stack of a folder, its parameters in `dtype`. ValueError tells what does not fit.

    mesh: the devices that the parameters are laid over; None = the first device. The LLM has no
    output layer of its own: its logits would be those of tied embeddings.
    """
    config, tensors, names = _open(folder)
    running: dict[str, Any] = {
        "remat": remat,
        "unroll_layers": unroll_layers,
        "attention": attention,
    }
    config = dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, **running),
        llm=dataclasses.replace(config.llm, **running),
    )
    module, table, options = _to_fill(config, tensors, names)
    parts = load_into(module, tensors, table, dtype, mesh=mesh, **options)
    if parts.bridge.up.bias is None:
        zeros = nnx.initializers.zeros
        bias = param(nnx.Rngs(0), (config.llm.width,), ("bridge",), zeros)
        bias[...] = bias[...].astype(dtype)
        parts.bridge.up.bias = bias
        if mesh is not None:
            nnx.update(parts.bridge, sharding.place(nnx.state(parts.bridge), mesh))
    return LoadedStack(
        stack=Stack(parts.encoder, parts.bridge, parts.llm),
        head=parts.head,
        labels=config.labels,
        kind=config.kind,
        bidirectional=config.bidirectional,
        max_length=config.max_length,
        languages=config.languages,
        legacy_source_order=config.legacy_source_order,
    )


def is_stack(folder: str | os.PathLike) -> bool:
    """Whether this is the folder of a stack, by its config.json."""
    try:
        values = json.loads((epath.Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") in MODEL_TYPES


def check_stack(folder: str | os.PathLike) -> StackConfig:
    """Raises what `load_stack` would, without reading any weight; returns what the folder holds."""
    config, tensors, names = _open(folder)
    module, table, options = _to_fill(config, tensors, names)
    match(module, tensors, table, **options)
    return config


def _open(folder: str | os.PathLike) -> tuple[StackConfig, Tensors, _Names]:
    source = read_config(folder, (_OURS, _AUTHORS))
    where = os.path.join(os.fspath(folder), "config.json")
    if source["model_type"] == _OURS:
        return _config_of_ours(source, where), Tensors(folder), _Names()
    tensors = Tensors(folder)
    names = _authors_names(tensors)
    return _config_of_authors(source, where, names), tensors, names


def _config_of_ours(source: Mapping[str, Any], where: str) -> StackConfig:
    # Folders from before there were other bridges do not say which.
    source = {"bridge_hidden": 0, "bridge_stride": 1, **source}
    kind = source.get("head")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ValueError(f"{where}: head is {kind!r}; it may be {', '.join(_CLASSES)}")
    for name, wanted in (
        ("bidirectional", bool),
        ("bridge_hidden", int),
        ("bridge_stride", int),
        ("language_at_end", bool),
        ("languages", list),
        ("max_source_length", int),
    ):
        if type(found := source.get(name)) is not wanted:
            raise ValueError(f"{where}: {name} is {found!r}; it must be {wanted.__name__}")
    for name, least in (("bridge_hidden", 0), ("bridge_stride", 1)):
        if source[name] < least:
            raise ValueError(f"{where}: {name} is {source[name]}; it must be at least {least}")
    llm = _llm_config(source, "llm_config", where)
    ours = {theirs: name for name, theirs in _projections(llm).items()}
    lora, given = {}, source.get("lora") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: lora is {given!r}; it must be an object or null")
    for name, adapter in given.items():
        if name not in ours:
            raise ValueError(f"{where}: lora has {name!r}; it may have {', '.join(ours)}")
        match adapter:
            case {"r": int(rank), "alpha": int() | float() as alpha} if rank > 0:
                lora[ours[name]] = rank, alpha
            case _:
                raise ValueError(f"{where}: lora.{name} is {adapter!r}; it must have r and alpha")
    return StackConfig(
        encoder=_encoder_config(source, "encoder_config", where),
        llm=llm,
        labels=_labels(source, where) if kind == "classification" else (),
        kind=kind,
        bidirectional=source["bidirectional"],
        max_length=source["max_source_length"],
        languages=tuple(source["languages"]),
        legacy_source_order=source["language_at_end"],
        lora=lora,
        bridge_hidden=source["bridge_hidden"],
        bridge_stride=source["bridge_stride"],
    )


def _config_of_authors(source: Mapping[str, Any], where: str, names: _Names) -> StackConfig:
    def field(model_types: Sequence[str]) -> str:
        for name, value in source.items():
            if isinstance(value, dict) and value.get("model_type") in model_types:
                return name
        allowed = ", ".join(model_types)
        raise ValueError(f"{where}: none of its fields is a config of model_type {allowed}")

    return StackConfig(
        encoder=_encoder_config(source, field(("m2m_100",)), where),
        llm=_llm_config(source, field(LLM_FAMILIES), where),
        labels=_labels(source, where) if names.head else (),
        kind="classification" if names.head else "none",
        bidirectional=True,
        max_length=_AUTHORS_MAX_LENGTH,
        languages=(),
        legacy_source_order=False,
        lora={},
    )


def _encoder_config(source: Mapping[str, Any], name: str, where: str) -> NLLBConfig | BertConfig:
    values = _complete(source, name, ("m2m_100", *BERT_FAMILIES), where)
    if values["model_type"] == "m2m_100":
        config = nllb.config_from_values(values, f"{where}: {name}")
        return dataclasses.replace(config, decoder_layers=0)
    return bert.config_from_values(values, f"{where}: {name}")


def _llm_config(source: Mapping[str, Any], name: str, where: str) -> LlamaConfig:
    try:
        config = llama.config_from_hf(_complete(source, name, LLM_FAMILIES, where))
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}") from None
    return dataclasses.replace(config, tie_embeddings=True)


def _complete(
    source: Mapping[str, Any], name: str, model_types: Sequence[str], where: str
) -> dict[str, Any]:
    """A model's config inside another, where transformers leaves out what is its default."""
    from transformers import AutoConfig

    values = source.get(name)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {name} is {values!r}; it must be the config of a model")
    if (found := values.get("model_type")) not in model_types:
        allowed = ", ".join(model_types)
        raise ValueError(f"{where}: {name}.model_type is {found!r}; it may be {allowed}")
    check_unquantised(values, f"{where}: {name}")
    try:
        return AutoConfig.for_model(**values).to_dict()
    except StrictDataclassError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{where}: {name}: {told}") from None


def _labels(source: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Names by id; transformers leaves out the two that are its default."""
    names = source.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise ValueError(f"{where}: id2label is {names!r}; it must name the labels 0, 1, …")
    return tuple(names[str(i)] for i in range(len(names)))


# ------------------------------------------------------------------ names


def _to_fill(
    config: StackConfig, tensors: Tensors, names: _Names
) -> tuple[_Parts, dict[str, str], dict[str, Any]]:
    """The parts without values, where each value lies, and what else `match` is to know."""
    has_bias = f"{names.bridge}.bias" in tensors.keys() or names == _Names()

    def parts() -> _Parts:
        rngs = nnx.Rngs(0)
        encoder: NLLB | Bert
        if isinstance(config.encoder, NLLBConfig):
            encoder = NLLB(config.encoder, rngs)
        else:
            encoder = Bert(config.encoder, rngs)
        bridge = Bridge(
            config.encoder.width,
            config.llm.width,
            1.0,
            rngs,
            hidden=config.bridge_hidden,
            stride=config.bridge_stride,
        )
        if not has_bias:
            bridge.up.bias = nnx.data(None)
        llm = Llama(config.llm, rngs)
        for name, (rank, alpha) in config.lora.items():
            adapters.attach(llm, rank=rank, alpha=alpha, dropout=0.0, targets=[name], rngs=rngs)
        head = None
        if config.kind != "none":
            head = classification_head(config.llm.width, len(config.labels) or 1, rngs)
        return _Parts(encoder, bridge, llm, head)

    table = _table(config, names)
    if not has_bias:
        del table["bridge.up.bias"]
    options: dict[str, Any] = {}
    if names != _Names():
        whole = names.encoder.removesuffix("encoder.")
        options["aliases"] = {f"{names.encoder}embed_tokens.weight": (f"{whole}shared.weight",)}
        # Constants of older files, and what a stack makes no use of.
        constants = ("*.rotary_emb.inv_freq", "*.embed_positions.weights")
        options["ignored"] = (*constants, "*lm_head.weight", f"{whole}decoder.*")
    return nnx.eval_shape(parts), table, options


def _table(config: StackConfig, names: _Names) -> dict[str, str]:
    """From our parameters to tensor names (see `hf/folder.py`)."""
    if isinstance(config.encoder, NLLBConfig):
        encoder = {
            path: names.encoder + name.removeprefix("model.encoder.")
            for path, name in nllb.key_table(config.encoder).items()
        }
        encoder["embedding_VE"] = f"{names.encoder}embed_tokens.weight"
    else:
        encoder = bert.key_table(config.encoder, names.encoder)
    llm = {
        path: names.llm + name.removeprefix("model.")
        for path, name in llama.key_table(config.llm).items()
    }
    for name in config.lora:
        kernel = llm[f"layers.{name}.kernel"]
        for path in (f"layers.{name}.kernel", f"layers.{name}.bias"):
            if path in llm:
                stem, _, weight = llm[path].rpartition(".")
                llm[path] = f"{stem}.base_layer.{weight}"
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            llm[f"layers.{name}.{ours}"] = f"{kernel.removesuffix('weight')}{theirs}.weight"
    maps = {"up": names.bridge} | ({"inner": "bridge_in"} if config.bridge_hidden else {})
    table = {f"encoder.{path}": name for path, name in encoder.items()}
    for part, name in maps.items():
        table[f"bridge.{part}.kernel"] = f"{name}.weight"
        table[f"bridge.{part}.bias"] = f"{name}.bias"
    table |= {f"llm.{path}": name for path, name in llm.items()}
    return table | ({} if config.kind == "none" else {"head.kernel": f"{names.head}.weight"})


def _projections(config: LlamaConfig) -> dict[str, str]:
    """The linear maps of the LLM's layers, our name to theirs: {"q": "q_proj", …}."""
    return {
        path.split(".")[1]: name.split(".")[-2]
        for path, name in llama.key_table(config).items()
        if path.startswith("layers.") and path.endswith(".kernel")
    }


def _authors_names(tensors: Tensors) -> _Names:
    """ValueError if a part is not there, or there twice."""

    def before(ending: str, other: str) -> list[str]:
        """What stands before `ending`, unless it ends with `other`."""
        found = (key.removesuffix(ending) for key in tensors.keys() if key.endswith(ending))
        return sorted(start for start in found if not start.endswith(other))

    parts = []
    for ending, other in (
        ("layers.0.fc1.weight", "decoder."),
        ("up_proj.weight", "mlp."),
        ("layers.0.mlp.gate_proj.weight", "\n"),
    ):
        if len(found := before(ending, other)) != 1:
            number = "no tensor" if not found else f"{len(found)} tensors"
            raise ValueError(f"{tensors.folder}: {number} …{ending}; a stack has one")
        parts += found
    encoder, bridge, llm = parts
    heads = before("score.weight", "\n")
    return _Names(encoder, f"{bridge}up_proj", llm, f"{heads[0]}score" if heads else None)
