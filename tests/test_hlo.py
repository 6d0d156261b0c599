"""What the reader of compiled programs makes of their text: of a written one, and of a real one."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtllm_jax import config as c
from mtllm_jax import sharding
from mtllm_jax.plan import hlo

# Of every way that compilers write groups, starts and loops.
PROGRAM = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %inner_cond (p.1: (s32[], f32[8])) -> pred[] {
      %p.1 = (s32[], f32[8]{0}) parameter(0)
      %constant.1 = s32[]{:T(128)} constant(5)
      %i.1 = s32[] get-tuple-element(%p.1), index=0
      ROOT %lt.1 = pred[] compare(%i.1, %constant.1), direction=LT
    }

    %inner_body (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
      %p.2 = (s32[], f32[8]{0}) parameter(0)
      %permuted = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), \
channel_id=3, source_target_pairs={{0,1},{1,0}}
      ROOT %t.2 = (s32[], f32[8]{0}) tuple(%i, %y)
    }

    %async_piece (q: bf16[4,2]) -> bf16[4,16] {
      %gathered.7 = bf16[4,16]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={1}, \
metadata={op_name="jit(step)/while/body/squeeze"}
    }

    %outer_cond (p.3: (s32[], f32[8])) -> pred[] {
      %constant.3 = s32[] constant(3)
      ROOT %lt.3 = pred[] compare(%i.3, %constant.3), direction=LT
    }

    %outer_body (p.4: (s32[], f32[8])) -> (s32[], f32[8]) {
      %start = bf16[4,16]{1,0} fusion(%q), kind=kCustom, calls=%async_piece
      %again = bf16[4,16]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,8]<=[16]
      %w = (s32[], f32[8]{0}) while(%init), condition=%inner_cond, body=%inner_body
      %scattered = f32[4]{0} reduce-scatter(%g), channel_id=4, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      ROOT %t.4 = (s32[], f32[8]{0}) tuple(%i.4, %z)
    }

    ENTRY %main (a: f32[8]) -> f32[8] {
      %loop = (s32[], f32[8]{0}) while(%t), condition=%outer_cond, body=%outer_body
      %both = (f32[6]{0}, pred[3]{0}) all-reduce(%a, %b), replica_groups={{0,1}}, to_apply=%add
      %exchanged = s8[10]{0} all-to-all(%a), replica_groups=[4,5]<=[20]
      ROOT %done = f32[8]{0} all-gather-done(%b)
    }

    %never_called (a: f32[8]) -> f32[8] {
      ROOT %gathered.9 = f32[800]{0} all-gather(%a), replica_groups={{0,1}}
    }
    """)


def test_a_written_program():
    found = {one.kind: one for one in hlo.collectives(PROGRAM)}
    assert len(found) == len(hlo.collectives(PROGRAM)) == 5
    facts = {kind: (one.bytes, one.times, one.group) for kind, one in found.items()}
    assert facts == {
        "all-gather": (4 * 16 * 2 * 7 / 8, 3, 8),
        "collective-permute": (8 * 4, 3 * 5, 1),
        "reduce-scatter": (4 * 4 * 3, 3, 4),
        "all-reduce": (2 * (6 * 4 + 3) / 2, 1, 2),
        "all-to-all": (10 * 4 / 5, 1, 5),
    }
    assert found["all-gather"].op == "jit(step)/while/body/squeeze"
    assert hlo.by_kind(list(found.values()))["collective-permute"] == 8 * 4 * 15


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight simulated devices of conftest")
def test_a_real_program_of_loops():
    """Weights of seven layers, gathered in a loop of a loop; a sum at the end."""
    mesh = sharding.make_mesh(c.Mesh(data=1, fsdp=8), jax.devices()[:8])

    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    def layer(h, w):
        return jnp.tanh(h @ jax.lax.with_sharding_constraint(w, place(None, None))), None

    def step(h, w):
        for_each = lambda h, _: (jax.lax.scan(layer, h, w)[0], None)  # noqa: E731
        return jnp.sum(jax.lax.scan(for_each, h, None, length=3)[0])

    h = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place("fsdp"))
    w = jax.ShapeDtypeStruct((7, 64, 64), jnp.float32, sharding=place(None, "fsdp"))
    found = hlo.collectives(jax.jit(step).lower(h, w).compile().as_text())
    (gather,) = (one for one in found if one.kind == "all-gather")
    assert (gather.times, gather.bytes, gather.group) == (21, 64 * 64 * 4 * 7 / 8, 8)
    (total,) = (one for one in found if one.kind == "all-reduce")
    assert (total.times, total.bytes) == (1, 2 * 4 * 7 / 8)
