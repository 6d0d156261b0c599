"""Where stage 1's bridge begins, if not at random: solved from tokens that both sides have [ours].

The linear map that is nearest in the mean square from the encoder's states to the LLM's embeddings
of its own tokens that end at the same characters, drawn out to the variance of these: what is not
explained would else be missing, and the LLM read mostly the mean. So it begins with inputs like
those that it knows, in their places, and stage 1 with what there is to learn beyond.

B rows, S encoder positions, T LLM positions, E encoder width, D LLM width, F = E + 1.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mtllm_jax import distributed, sharding
from mtllm_jax.checkpoint import has_params, load_params, save_params
from mtllm_jax.config import MTLLM
from mtllm_jax.data.packing import Rows
from mtllm_jax.data.pipeline import batches
from mtllm_jax.models.stack import Stack
from mtllm_jax.objectives import aligned_places
from mtllm_jax.recipes.job import Job

# Added to the diagonal of the states' covariance, as a share of its mean [ours]: enough that
# directions in which states hardly differ stay out of it.
_RIDGE = 1e-3


def begin_bridge(job: Job[MTLLM], stack: Stack, rows: Callable[[], Rows], seed: int) -> None:
    """Put the solved map into the stack's bridge, in place, and keep it in the stage's folder.

    rows: makes those of stage 1, with the places of aligned tokens; `adaptation.bridge_batches`
    batches of them are read, or all. ValueError where no tokens of both sides end together.
    """
    with job.stage("bridge", "the bridge's start") as stage:
        folder = stage.path / "params"
        state = nnx.state(stack.bridge)
        if distributed.by_first(lambda: has_params(folder)):
            nnx.update(stack.bridge, load_params(folder, sharding.place(state, job.mesh)))
            return
        squares_FF, products_FD, energy = _sums(job, stack, rows(), seed)
        num_tokens = squares_FF[-1, -1]
        if not num_tokens:
            raise ValueError(
                "adaptation.bridge_start 'embeddings' finds no tokens of encoder and LLM that end"
                " at the same characters of the English text; it must be 'random' for these."
            )
        kernel_ED, bias_D, explained = solve(squares_FF, products_FD, energy)
        up = stack.bridge.up
        up.kernel[...] = jnp.asarray(kernel_ED, jnp.float32)
        assert up.bias is not None  # a bridge has one
        up.bias[...] = jnp.asarray(bias_D, jnp.float32)
        save_params(folder, sharding.place(nnx.state(stack.bridge), job.mesh))
        stage.notes |= {"tokens": int(num_tokens), "explained": round(float(explained), 4)}
        job.console.print(
            f"{num_tokens:,.0f} tokens that end together: encoder states explain"
            f" {explained:.0%} of the variance of the LLM's embeddings"
        )


def _sums(
    job: Job[MTLLM], stack: Stack, rows: Rows, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Over all aligned tokens, x a state with a 1 behind it, y an embedding: Σ x xᵀ [F, F],
    Σ x yᵀ [F, D] and Σ |y|², float64."""
    config, mesh = job.config, job.mesh
    training, dtype = config.adaptation.training, jnp.dtype(config.compute_dtype)
    graph, state = nnx.split((stack.encoder, stack.llm))

    def sums(state: nnx.State, batch: dict[str, Array]) -> tuple[Array, Array, Array]:
        encoder, llm = nnx.merge(graph, state)
        segments_BS = batch["source_segments"]
        num_texts = batch["example"].shape[1]
        h_BSE = encoder.encode(batch["source_ids"], segments_BS, dtype, packed=num_texts > 1)
        is_aligned_BS, place_BS = aligned_places(
            batch["aligned_ids"], segments_BS, batch["target_segments"], num_texts
        )
        embedded_BTD = llm.embed(batch["target_ids"], dtype)
        y_BSD = jnp.take_along_axis(embedded_BTD, place_BS[:, :, None], axis=1)
        counts_BS1 = is_aligned_BS[:, :, None].astype(jnp.float32)
        x_BSF = jnp.concatenate([h_BSE.astype(jnp.float32), jnp.ones_like(counts_BS1)], axis=-1)
        x_BSF, y_BSD = x_BSF * counts_BS1, y_BSD.astype(jnp.float32) * counts_BS1
        exact = jax.lax.Precision.HIGHEST
        return (
            jnp.einsum("bsf,bsg->fg", x_BSF, x_BSF, precision=exact),
            jnp.einsum("bsf,bsd->fd", x_BSF, y_BSD, precision=exact),
            jnp.sum(jnp.square(y_BSD)),
        )

    everywhere = jax.NamedSharding(mesh, jax.P())
    summed = jax.jit(sharding.on(mesh, sums), out_shardings=everywhere)
    state = sharding.place(state, mesh)
    iterator = batches(
        rows,
        batch_rows=training.batch_rows,
        seed=seed,
        mine=sharding.process_rows(training.batch_rows, mesh),
    )
    count = min(config.adaptation.bridge_batches, -(-len(rows) // training.batch_rows))
    total: tuple[Any, ...] = (0.0, 0.0, 0.0)
    bar = job.console.progress(count, "aligned tokens", "batches")
    with contextlib.closing(iterator):
        for done, batch in enumerate(itertools.islice(iterator, count), 1):
            found = summed(state, sharding.place_batch(batch, mesh, training.batch_rows))
            # Float32 holds what a batch sums up to, not all of them.
            total = tuple(a + np.asarray(b, np.float64) for a, b in zip(total, found, strict=True))
            bar.update(done)
    squares_FF, products_FD, energy = total
    return squares_FF, products_FD, float(energy)


def solve(
    squares_FF: np.ndarray, products_FD: np.ndarray, energy: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Ridge regression from its sums, drawn out around the mean until what it says varies as much
    as y: (kernel [E, D], bias [D], the share of y's variance that the regression explains).

    squares_FF: Σ x xᵀ of inputs with a 1 behind them; products_FD: Σ x yᵀ; energy: Σ |y|². The
    bias has no part in the ridge.
    """
    num_tokens = squares_FF[-1, -1]
    mean_E, mean_D = squares_FF[-1, :-1] / num_tokens, products_FD[-1] / num_tokens
    covariance_EE = squares_FF[:-1, :-1] / num_tokens - np.outer(mean_E, mean_E)
    cross_ED = products_FD[:-1] / num_tokens - np.outer(mean_E, mean_D)
    ridge = _RIDGE * np.trace(covariance_EE) / len(covariance_EE)
    kernel_ED = np.linalg.solve(covariance_EE + ridge * np.eye(len(covariance_EE)), cross_ED)
    variance = energy / num_tokens - mean_D @ mean_D
    predicted = np.sum(kernel_ED * (covariance_EE @ kernel_ED))
    unexplained = variance - 2 * np.sum(kernel_ED * cross_ED) + predicted
    kernel_ED = kernel_ED * np.sqrt(variance / predicted)
    return kernel_ED, mean_D - mean_E @ kernel_ED, 1 - unexplained / variance
