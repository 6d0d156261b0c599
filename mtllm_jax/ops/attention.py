"""Attention over packed rows: one function, several backends.

B rows, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head
width.

| backend | platforms     | dtypes            | head widths   | packed | context | drop | mask     |
|---------|---------------|-------------------|---------------|--------|---------|------|----------|
| xla     | cpu, gpu, tpu | any               | any           | yes    | yes     | yes  | [B,T,S]  |
| cudnn   | gpu           | bfloat16, float16 | 8, 16 … 128   | no     | no      | no   | lengths  |
| splash  | tpu           | bfloat16, float32 | 64, 128 … 256 | yes    | yes     | no   | segments |

packed: rows of several texts, with padding anywhere. context: a row's queries on several devices.
drop: weights of the softmax are dropped out where that is wanted.
Each reads causally (with a window, if wanted) or both ways, has fewer key heads than query heads
where the model has, and keys of another length than the queries.

- `xla`: plain products and a softmax. Where there are many scores, some queries at a time are read,
  so that neither scores nor mask are ever whole.
- `cudnn`: cuDNN's fused attention, which is told how long a row's text is and nothing more. A row
  of another kind than was promised comes out as NaN.
- `splash`: JAX's Pallas kernel, blocks of scores at a time.
- `auto`: the fastest of them that can do what is asked.

Under a mesh, rows lie over data × fsdp, heads over tensor and queries over context; over context,
each device gathers all keys and values of its rows.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mtllm_jax.ops import layout

_MASKED = -1e30  # finite: a row of padding alone then gets a uniform, unused average, not NaN
MOST_SCORES = 2**28  # of a device at a time; 1 GB
_TILE = 128  # splash cuts queries and keys into blocks of multiples of this


@dataclasses.dataclass(frozen=True)
class Backend:
    """A line of the table above."""

    platforms: tuple[str, ...]
    dtypes: tuple[str, ...] | None  # None = any
    head_widths: tuple[int, int] | None  # multiples of the first, up to the second; None = any
    packed: bool  # several texts in a row, padding anywhere
    context: bool  # queries of a row on several devices
    drops: bool = False  # weights of the softmax


BACKENDS = {
    "xla": Backend(("cpu", "gpu", "tpu"), None, None, packed=True, context=True, drops=True),
    "cudnn": Backend(("gpu",), ("bfloat16", "float16"), (8, 128), packed=False, context=False),
    "splash": Backend(("tpu",), ("bfloat16", "float32"), (64, 256), packed=True, context=True),
}
_BY_SPEED = ("splash", "cudnn", "xla")
NAMES = ("auto", *BACKENDS)


def check_attention(
    backend: str,
    platform: str | None = None,
    *,
    segments: bool = False,
    causal: bool | None = None,
    window: int | None = None,
    head_width: int | None = None,
    dtype: DTypeLike | None = None,
    context: int = 1,
    drops: bool = False,
) -> None:
    """Raise ValueError, a sentence, unless the backend can do this; None = not known yet.

    platform: "cpu", "gpu" or "tpu". segments: rows may hold several texts. context: devices that
    the queries of a row lie on. drops: weights of the softmax are dropped out.
    """
    if window is not None and causal is False:
        raise ValueError(f"window is {window}, which only causal attention has.")
    if backend not in NAMES:
        raise ValueError(f"attention is {backend!r}; it may be one of {', '.join(NAMES)}.")
    if backend == "auto":
        return
    can = BACKENDS[backend]
    if platform is not None and platform not in can.platforms:
        raise _refusal(backend, f"runs on {', '.join(can.platforms)} and not on {platform}")
    if dtype is not None and can.dtypes and jnp.dtype(dtype).name not in can.dtypes:
        raise _refusal(backend, f"computes in {' or '.join(can.dtypes)}, not {jnp.dtype(dtype)}")
    if head_width is not None and can.head_widths is not None:
        step, most = can.head_widths
        if head_width % step or head_width > most:
            raise _refusal(
                backend, f"has head widths of multiples of {step} up to {most}, not {head_width}"
            )
    if segments and not can.packed:
        raise _refusal(backend, "reads one text a row, and rows here are packed with several")
    if context > 1 and not can.context:
        raise _refusal(backend, f"reads whole rows, and context cuts them over {context} devices")
    if drops and not can.drops:
        raise _refusal(backend, "drops nothing out")


def _refusal(backend: str, why: str) -> ValueError:
    others = [name for name in NAMES if name != backend]
    return ValueError(f"attention is {backend!r}, which {why}; others are {', '.join(others)}.")


def choose_backend(
    platform: str,
    *,
    segments: bool,
    window: int | None = None,
    head_width: int,
    dtype: DTypeLike,
    context: int = 1,
) -> str:
    """What `auto` stands for: the first backend by speed that `check_attention` lets pass."""
    for backend in _BY_SPEED:
        try:
            check_attention(
                backend,
                platform,
                segments=segments,
                window=window,
                head_width=head_width,
                dtype=dtype,
                context=context,
            )
        except ValueError:
            continue
        return backend
    raise AssertionError("xla does everything")


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    query_segments_BT: Array,
    key_segments_BS: Array,
    causal: bool = False,
    window: int | None = None,
    packed: bool = True,
    branches: bool = False,
    backend: str = "auto",
    dropout: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Softmax attention among the positions of one packed text. Returns [B, T, N, H].

    Segments are int32, 0 = padding; a query sees the keys of its own segment alone. causal: only
    keys at or before its own place in the row; window: only the last `window` of those (Mistral's
    sliding window). packed=False promises one text a row, from its first position on. branches:
    segment 1 is seen by the others of its row too, which all go on from it; by xla, whatever the
    backend. Scores are scaled by H^-1/2 and normalised in float32. What a query without a key to
    see reads is finite, and has no meaning. dropout: the share of the softmax's weights that are
    left out where there is a key to draw them by; the others grow by as much. ValueError where the
    backend cannot do it.
    """
    dropped = None if dropout == 0 or dropout_key is None else (dropout, dropout_key)
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    platform, context = layout.platform(), layout.axis_size("context")
    if branches:
        backend = "xla"
    # Of few queries the others' blocks would be mostly empty. A kernel cannot be laid over devices
    # where nothing says how.
    if backend == "auto" and (T < _TILE or not layout.is_placed() or dropped):
        backend = "xla"
    elif backend == "auto":
        backend = choose_backend(
            platform, segments=packed, head_width=H, dtype=q_BTNH.dtype, context=context
        )
    check_attention(
        backend,
        platform,
        segments=packed,
        causal=causal,
        window=window,
        head_width=H,
        dtype=q_BTNH.dtype,
        context=context,
        drops=dropped is not None,
    )
    arrays = q_BTNH, k_BSKH, v_BSKH, query_segments_BT, key_segments_BS
    if backend == "splash":
        return splash_attention(*arrays, causal=causal, window=window)
    if backend == "cudnn":
        return _cudnn_attention(*arrays, causal=causal, window=window)
    mask = _Mask(causal, window, branches)
    if context == 1 or dropped:  # what is drawn over context is laid out by the compiler
        return _xla_attention(*arrays, mask=mask, dropped=dropped)

    def local(q_BTNH: Array, *others: Array) -> Array:
        here = q_BTNH.shape[1]
        first = jax.lax.axis_index("context") * here if here < T else 0
        return _xla_attention(q_BTNH, *others, mask=mask, first=first)

    specs = _specs(q_BTNH, k_BSKH)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _specs(q_BTNH: Array, k_BSKH: Array) -> tuple[PartitionSpec, ...]:
    """Where queries, keys, values and both segments lie over the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    k_dims = ("rows", "features", "heads", "features")
    rows, _, heads, _ = layout.spec(k_dims, k_BSKH.shape, mesh, "keys")
    # Query heads stay with the key head that they share.
    tokens = layout.spec(("rows", "tokens"), q_BTNH.shape[:2], mesh, "queries")[1]
    keys = PartitionSpec(rows, None, heads, None)
    queries = PartitionSpec(rows, tokens, heads, None)
    return queries, keys, keys, PartitionSpec(rows, tokens), PartitionSpec(rows, None)


# ---------------------------------------------------------------- xla


@dataclasses.dataclass(frozen=True)
class _Mask:
    """Which keys of a row a query sees; as `attention` says."""

    causal: bool
    window: int | None
    branches: bool


def _xla_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    query_segments_BT: Array,
    key_segments_BS: Array,
    *,
    mask: _Mask,
    first: Array | int = 0,
    dropped: tuple[float, Array] | None = None,
) -> Array:
    """first: the place in its row of the first query here, where others lie elsewhere. dropped:
    the share of weights left out, and the key that they are drawn by."""
    B, T, N, H = q_BTNH.shape
    keys = k_BSKH, v_BSKH, key_segments_BS
    scores_a_query = B * N * k_BSKH.shape[1] / layout.ways(B, "rows") / layout.ways(N, "heads")
    if scores_a_query * T <= MOST_SCORES:
        return _scored_at_once(q_BTNH, query_segments_BT, first, *keys, mask, dropped)

    @jax.checkpoint
    def piece(queries: tuple[Array, Array, Array]) -> Array:
        of_piece = dropped and (dropped[0], jax.random.fold_in(dropped[1], queries[2]))
        return _scored_at_once(*queries, *keys, mask, of_piece)

    size = min(T, 2 ** max(0, math.floor(math.log2(MOST_SCORES / scores_a_query))))
    num = -(-T // size)
    q_CBQNH, segments_CBQ = (
        jnp.pad(x, ((0, 0), (0, num * size - T)) + ((0, 0),) * (x.ndim - 2))
        .reshape(B, num, size, *x.shape[2:])
        .swapaxes(0, 1)
        for x in (q_BTNH, query_segments_BT)
    )
    read_CBQNH = jax.lax.map(piece, (q_CBQNH, segments_CBQ, first + size * jnp.arange(num)))
    return read_CBQNH.swapaxes(0, 1).reshape(B, num * size, N, H)[:, :T]


def _scored_at_once(
    q_BTNH: Array,
    query_segments_BT: Array,
    first: Array | int,
    k_BSKH: Array,
    v_BSKH: Array,
    key_segments_BS: Array,
    mask: _Mask,
    dropped: tuple[float, Array] | None,
) -> Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    seen_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    if mask.branches:
        seen_BTS |= key_segments_BS[:, None, :] == 1
    seen_BTS &= key_segments_BS[:, None, :] > 0
    if mask.causal:
        distance_TS = (first + jnp.arange(T))[:, None] - jnp.arange(S)[None, :]
        near_TS = distance_TS >= 0
        if mask.window is not None:
            near_TS &= distance_TS < mask.window
        seen_BTS &= near_TS[None]
    # Heads in front and a key head's queries in one dim: plain batched matrix products.
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    q_BKQH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    scores_BKQS = jnp.matmul(q_BKQH, k_BKHS, preferred_element_type=jnp.float32)
    scores = scores_BKQS.reshape(B, K, -1, T, S)
    scores = jnp.where(seen_BTS[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropped is not None:
        share, key = dropped
        weights *= jax.random.bernoulli(key, 1 - share, weights.shape) / (1 - share)
    weights_BKQS = weights.astype(v_BSKH.dtype).reshape(B, K, -1, S)
    mixed = jnp.matmul(weights_BKQS, v_BKSH).reshape(B, K, N // K, T, H)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# ---------------------------------------------------------------- cudnn


def _cudnn_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    query_segments_BT: Array,
    key_segments_BS: Array,
    *,
    causal: bool,
    window: int | None,
) -> Array:
    query_lengths_B, one_query_text_B = _lengths(query_segments_BT)
    key_lengths_B, one_key_text_B = _lengths(key_segments_BS)
    read_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        query_seq_lengths=query_lengths_B,
        key_value_seq_lengths=key_lengths_B,
        implementation="cudnn",
    )
    read_BTNH = jnp.where(query_segments_BT[:, :, None, None] > 0, read_BTNH, 0)
    sound_B = one_query_text_B & one_key_text_B
    return jnp.where(sound_B[:, None, None, None], read_BTNH, jnp.nan)


def _lengths(segments_BT: Array) -> tuple[Array, Array]:
    """Tokens of each row, at least 1, and whether they are one text from the row's start on."""
    lengths_B = jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
    one_text_BT = jnp.arange(segments_BT.shape[1])[None] < lengths_B[:, None]
    return jnp.maximum(lengths_B, 1), jnp.all(segments_BT == one_text_BT, axis=1)


# ---------------------------------------------------------------- splash


def splash_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    query_segments_BT: Array,
    key_segments_BS: Array,
    *,
    causal: bool,
    window: int | None,
    interpret: bool = False,
) -> Array:
    """`attention` by splash. interpret: run the kernel's program anywhere, slowly, to test it."""
    # Here, as it is for TPUs alone and experimental: others do not depend on where it lies.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, H = q_BTNH.shape[1:]
    context = layout.axis_size("context")
    q_BTNH, query_segments_BT = (_padded(x, _TILE * context) for x in (q_BTNH, query_segments_BT))
    k_BSKH, v_BSKH, key_segments_BS = (_padded(x, _TILE) for x in (k_BSKH, v_BSKH, key_segments_BS))
    # What all queries see alike is the same for the queries of each device.
    cut_mask = context if causal else 1
    shape = q_BTNH.shape[1] // context * cut_mask, k_BSKH.shape[1]
    mask: masks.Mask = masks.FullMask(shape)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), offset=0)
    elif causal:
        mask = masks.CausalMask(shape)
    block_q, block_kv = _block(shape[0] // cut_mask), _block(shape[1])
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=cut_mask,
        interpret=interpret,
    )

    def local(kernel: Callable[..., Array], *arrays: Array) -> Array:
        q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in arrays[:3])
        q_BNTH = q_BNTH * jnp.asarray(H**-0.5, q_BNTH.dtype)
        segments = splash.SegmentIds(*arrays[3:])
        read_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
        return read_BNTH.swapaxes(1, 2)

    # The partitioner cannot see into the kernel.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        specs = _specs(q_BTNH, k_BSKH)
        places = NamedSharding(mesh, PartitionSpec(None, specs[0][1] if causal else None))
        in_specs = (kernel.manual_sharding_spec(places), *specs)
        local = jax.shard_map(local, in_specs=in_specs, out_specs=specs[0], check_vma=False)
    return local(kernel, q_BTNH, k_BSKH, v_BSKH, query_segments_BT, key_segments_BS)[:, :T]


def _padded(x: Array, multiple: int) -> Array:
    """[B, T, …] with zeros behind, up to a multiple of positions."""
    short = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))


def _block(length: int) -> int:
    """The largest block, of up to four tiles, that divides the length."""
    return next(size for size in (4 * _TILE, 2 * _TILE, _TILE) if length % size == 0)
