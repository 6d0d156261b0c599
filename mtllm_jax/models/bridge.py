"""The bridge: encoder states → inputs of the LLM (MT-LLM's up-projection).

B rows, S encoder positions, E encoder width, D decoder width.
"""

from flax import nnx
from jax import Array

from mtllm_jax.models.layers import Linear


class Bridge(nnx.Module):
    """One linear map with bias, E → D, one LLM position per encoder position [code].

    scale: standard deviation of an output element at the start, for encoder states of rms 1; that
    of the LLM's own input embeddings lets the stack begin where the LLM feels at home [ours].
    """

    def __init__(self, encoder_width: int, decoder_width: int, scale: float, rngs: nnx.Rngs):
        self.up = Linear(
            encoder_width,
            decoder_width,
            ("embed", "bridge"),
            init=nnx.initializers.normal(scale * encoder_width**-0.5),
            rngs=rngs,
            use_bias=True,
        )

    def __call__(self, h_BSE: Array) -> Array:
        """[B, S, E] → [B, S, D], in the dtype of the input."""
        return self.up(h_BSE)
