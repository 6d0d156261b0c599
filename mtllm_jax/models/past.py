"""Keys and values that are kept, for attention to look back on token after token.

B rows, N heads that have keys and values, P places, Q queries of such a head, T tokens that are put
in together, H head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mtllm_jax.ops.layout import constrain


class Past(NamedTuple):
    """Keys and values of a layer. They lie as they are read, which is once for every token: keys
    have their features before their places."""

    k_BNHP: Array
    v_BNPH: Array

    @classmethod
    def of(cls, k_BPNH: Array, v_BPNH: Array) -> "Past":
        """That of all these."""
        return cls(k_BPNH.transpose(0, 2, 3, 1), v_BPNH.swapaxes(1, 2)).laid()

    def with_room(self, num_places: int) -> "Past":
        """The same with so many more places."""
        none, room = (0, 0), (0, num_places)
        k_BNHP = jnp.pad(self.k_BNHP, (none, none, none, room))
        return Past(k_BNHP, jnp.pad(self.v_BNPH, (none, none, room, none)))

    def with_tokens(self, k_BTNH: Array, v_BTNH: Array, place: Array | int) -> "Past":
        """The same with those of tokens, from a place on."""
        new, update = Past.of(k_BTNH, v_BTNH), jax.lax.dynamic_update_slice_in_dim
        k_BNHP = update(self.k_BNHP, new.k_BNHP, place, axis=3)
        return Past(k_BNHP, update(self.v_BNPH, new.v_BNPH, place, axis=2)).laid()

    def laid(self) -> "Past":
        """Over the mesh by rows and heads."""
        return Past(*(constrain(x, "rows", "heads", "features", "features") for x in self))

    def read(self, q_BNQH: Array, is_read_BNQP: Array) -> Array:
        """What each query reads from the places that it may read, [B, N, Q, H]. is_read_BNQP: bool,
        or with 1 in the place of N and Q."""
        q_BNQH = q_BNQH * jnp.asarray(q_BNQH.shape[-1] ** -0.5, q_BNQH.dtype)
        scores_BNQP = jnp.einsum(
            "bnqh,bnhp->bnqp", q_BNQH, self.k_BNHP, preferred_element_type=jnp.float32
        )
        # Not minus infinity: rows that only fill the batch may have nothing to read.
        scores_BNQP = jnp.where(is_read_BNQP, scores_BNQP, jnp.finfo(jnp.float32).min)
        weights_BNQP = jax.nn.softmax(scores_BNQP).astype(self.v_BNPH.dtype)
        return jnp.einsum("bnqp,bnph->bnqh", weights_BNQP, self.v_BNPH)


def no_past(B: int, N: int, P: int, H: int, dtype: jnp.dtype) -> Past:
    """Places that nothing has been put into."""
    return Past(jnp.zeros((B, N, H, P), dtype), jnp.zeros((B, N, P, H), dtype)).laid()
