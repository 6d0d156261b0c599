"""Text encoders of every family here: NLLB's and M2M100's, BERT, XLM-R and RoBERTa."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtllm_jax.hf.bert import check_bert, load_bert
from mtllm_jax.hf.folder import read_config
from mtllm_jax.hf.nllb import check_nllb, load_nllb
from mtllm_jax.hf.tensors import Progress
from mtllm_jax.models.bert import FAMILIES, Bert, BertConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig

Encoder = NLLB | Bert

# model_types of config.json
TRANSLATORS = ("m2m_100",)
ENCODERS = (*TRANSLATORS, *FAMILIES)


def has_decoder(folder: str | os.PathLike) -> bool:
    """Whether a folder's model can translate. ValueError for a model of no family here."""
    return read_config(folder, ENCODERS)["model_type"] in TRANSLATORS


def load_encoder(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
    remat: str = "none",
    unroll_layers: bool = False,
    attention: str = "auto",
) -> Encoder:
    """The encoder of a folder, without the decoder where there is one.

    Arguments and errors are those of `load_nllb` and `load_bert`.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "mesh": mesh,
        "progress": progress,
        "remat": remat,
        "unroll_layers": unroll_layers,
        "attention": attention,
    }
    if has_decoder(folder):
        return load_nllb(folder, with_decoder=False, **options)
    return load_bert(folder, **options)


def check_encoder(folder: str | os.PathLike) -> NLLBConfig | BertConfig:
    """Raises what `load_encoder` would, without reading any weight; returns the model's sizes."""
    return check_nllb(folder) if has_decoder(folder) else check_bert(folder)
