"""Texts through a model, many at a time: rows of like length together, few compiled shapes.

B rows, S positions, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from mtllm_jax import sharding
from mtllm_jax.data.packing import padded
from mtllm_jax.data.pipeline import by_length

# (state, ids [B, S], segments [B, S]) → one vector per row, [B, D], or one per choice, [B, C, D]
Forward = Callable[[Any, Array, Array], Array]


_AHEAD = 2  # batches that are dispatched while one is computed


class Vectors:
    """A forward pass as a function from tokenised texts to float32 vectors, [texts, D] or more.

    forward is compiled once per length (`packing.padded` has few). batch_rows: texts per forward
    pass; a multiple of the devices that rows are cut over (ValueError otherwise). Several processes
    call it with the same texts, and all get the vectors.
    """

    def __init__(
        self,
        forward: Forward,
        state: Any,
        *,
        pad_id: int,
        batch_rows: int,
        mesh: jax.sharding.Mesh,
    ):
        sharding.check_rows(batch_rows, mesh, "evaluation.batch_rows")
        everywhere = jax.NamedSharding(mesh, jax.P())
        self._forward = jax.jit(sharding.on(mesh, forward), out_shardings=everywhere)
        self._state = sharding.place(state, mesh)
        self._pad_id = pad_id
        self._batch_rows = batch_rows
        self._mesh = mesh

    def __call__(
        self, texts: Sequence[np.ndarray], marks: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """In the order given. ValueError if there are none.

        marks: what `forward` gets as segments at the tokens of each text, instead of 1.
        """
        if not texts:
            raise ValueError("there are no texts to run through the model.")
        pending = []
        for places in by_length([len(text) for text in texts], self._batch_rows):
            chosen = [texts[i] for i in places]
            ways = self._mesh.shape["context"]
            rows = padded(chosen, "text", self._pad_id, rows=self._batch_rows, ways=ways)
            if marks is not None:
                for row, place in enumerate(places):
                    rows["text_segments"][row, : len(marks[place])] = marks[place]
            batch = sharding.place_batch(rows, self._mesh)
            # Dispatch does not wait: the next batch is padded while this one is computed. But what
            # is dispatched is computed to its end, also where the process is asked to stop.
            pending.append(
                (places, self._forward(self._state, batch["text_ids"], batch["text_segments"]))
            )
            if len(pending) > _AHEAD:
                pending[-1 - _AHEAD][1].block_until_ready()
        width = pending[0][1].shape[1:]
        result = np.empty((len(texts), *width), np.float32)
        for places, vectors in pending:
            result[places] = np.asarray(vectors)[: len(places)]
        return result
