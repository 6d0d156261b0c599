"""Rotary positions (RoFormer, arXiv 2104.09864), half-split as in Hugging Face checkpoints.

B rows, T positions, N heads, H head width. Dims i and i + H/2 form the pair that frequency i turns;
the paper (and Meta's own files) pair 2i with 2i + 1, so q and k rows are stored in another order.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): every frequency divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long waves slowed by `factor`, short ones kept, a ramp between.

    `original_positions` is the context length before extension; a wave is long if fewer than
    `low_frequency_factor` turns of it fit in there, short if more than `high_frequency_factor` do.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): long waves slowed by `factor`, short ones kept, a ramp between.

    The ramp runs over the dims, from the one that makes `beta_fast` turns in the context length
    before extension, `original_positions`, to the one that makes `beta_slow`; truncate: from and to
    whole dims. q and k are both multiplied by `attention_factor`, the paper's sqrt(1/t).
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def rope_frequencies(
    head_width: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Radians per position, float32 [H/2]: theta^(−2i/H), scaled. A constant of the model.

    ValueError for an odd `head_width`, which leaves a dim without a partner.
    """
    if head_width % 2:
        raise ValueError(f"head_width is {head_width}; rotary positions need an even number")
    # At position 100,000 the last bit shows. So this file rounds to float32 where torch does, which
    # the checkpoints were trained with; the power in float64, as numpy's of float32 is less exact.
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    periods = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / periods
    match scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / np.float32(factor)
        case Llama3Scaling():
            return _llama3(frequencies, scaling)
        case YarnScaling():
            return _yarn(periods, theta, scaling)


def rope_gain(scaling: RopeScaling | None) -> float:
    """What `apply_rope` multiplies q and k by: YaRN's attention factor, otherwise 1."""
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """The frequencies of Llama 3.1, after the reference code in Meta's `llama-models` release."""
    wavelengths = (1.0 / frequencies) * np.float32(2 * np.pi)
    turns = scaling.original_positions * (1.0 / wavelengths)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(periods: np.ndarray, theta: float, scaling: YarnScaling) -> np.ndarray:
    """The frequencies of the paper's "NTK-by-parts"; periods: theta^(2i/H), 1 / frequency."""
    half = len(periods)

    def place(turns: float) -> float:
        """The dim whose wave makes so many: theta^(−dim / half) · positions = 2π · turns."""
        return half * math.log(scaling.original_positions / (2 * math.pi * turns)) / math.log(theta)

    first, last = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The reference's bound is the last of all dims, though the pairs end at half of them.
    first, last = max(first, 0), min(last, 2 * half - 1)
    length = last - first if last != first else 0.001
    kept = 1.0 - np.clip((np.arange(half, dtype=np.float32) - first) / length, 0.0, 1.0)
    slow, fast = 1.0 / (scaling.factor * periods), 1.0 / periods
    return slow * (1.0 - kept) + fast * kept


def apply_rope(
    x_BTNH: Array, positions_BT: Array, frequencies: np.ndarray, gain: float = 1.0
) -> Array:
    """Turn each pair of dims by position × frequency. Computed in float32, returned as `x` came.

    positions_BT: int32, from 0 within each text. frequencies: float32 [H/2]. gain: see `rope_gain`.
    """
    angles_BTH = positions_BT[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None]
    cos, sin = (gain * f(angles_BTH)[:, :, None] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
