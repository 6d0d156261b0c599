"""SDRRL and what it is compared with, as settings of one builder."""

import dataclasses

from mtllm_jax.config import TransferSet

_NONE = {
    "ll": 0.0, "lt": 0.0, "tl": 0.0, "tt": 0.0,
    "switched": 0.0, "translation": 0.0, "completion": 0.0,
}  # fmt: skip
PARTS = ("own_answers", *_NONE)


def sdrrl(source: str, targets: tuple[str, ...], seed: int = 0) -> TransferSet:
    """All parts, from the model's own answers."""
    return TransferSet(source, targets, seed)


def sdrrl_without(part: str, source: str, targets: tuple[str, ...], seed: int = 0) -> TransferSet:
    """SDRRL but for one of PARTS; without own answers it has the references. ValueError for no
    part."""
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of SDRRL; it must be one of {', '.join(PARTS)}.")
    whole = sdrrl(source, targets, seed)
    if part == "own_answers":
        return dataclasses.replace(whole, answers="reference")
    return dataclasses.replace(whole, **{part: 0.0})  # type: ignore[arg-type]


def sft(source: str, targets: tuple[str, ...], seed: int = 0) -> TransferSet:
    """Fine-tuning on the data as it is, in the source language."""
    return _only(source, targets, seed, ll=1.0)


def t_sft(source: str, targets: tuple[str, ...], seed: int = 0) -> TransferSet:
    """Fine-tuning on the data translated into the targets."""
    return _only(source, targets, seed, tt=1.0)


def cross_lingual(source: str, targets: tuple[str, ...], seed: int = 0) -> TransferSet:
    """Cross-lingual instruction tuning: the data, its translations, and translation tasks."""
    return _only(source, targets, seed, ll=1.0, tt=1.0, translation=1.0)


def sdft(source: str, targets: tuple[str, ...], seed: int = 0) -> TransferSet:
    """Fine-tuning on references that the model has put in its own words, in the source language."""
    return dataclasses.replace(sft(source, targets, seed), answers="rewritten")


def _only(source: str, targets: tuple[str, ...], seed: int, **weights: float) -> TransferSet:
    fields = {**_NONE, **weights}
    return TransferSet(source, targets, seed, answers="reference", **fields)  # type: ignore[arg-type]
