"""What the processes of one job do together, checked in each of them by brute force.

    python one_of_processes.py    with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID

Two devices a process. Prints, as JSON, what all must agree on.
"""

import json
import sys
import time

import jax
import numpy as np
from flax import nnx
from toy_model import Toy, mesh_of

from mtllm_jax import distributed, sharding
from mtllm_jax.checkpoint import tree_hash

ROWS = 8
MESHES = ((4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4))


def main() -> None:
    distributed.start()
    first = jax.process_index() == 0
    assert distributed.in_job() and distributed.is_first() == first
    assert jax.process_count() == 2 and len(jax.devices()) == 4

    # Longer than one look for the answer takes.
    assert distributed.by_first(lambda: time.sleep(2.5) or "late") == "late"
    called = []
    said = [distributed.by_first(lambda i=i: called.append(i) or [i, "é", None]) for i in range(3)]
    assert said == [[0, "é", None], [1, "é", None], [2, "é", None]]
    assert called == ([0, 1, 2] if first else [])
    assert distributed.after_first(lambda: jax.process_index()) == jax.process_index()

    ballot = distributed.Ballot()
    asked = [0, 0, 15 if first else 0, 0, 2]
    assert [ballot(number) for number in asked] == [0, 0, 0, 15, 0]

    whole = {
        "source_ids": np.arange(ROWS * 4, dtype=np.int32).reshape(ROWS, 4),
        "teacher": np.random.default_rng(0).normal(size=(ROWS, 3, 2)).astype(np.float32),
    }
    sharding.SMALLEST_SHARDED = 2
    model = Toy()
    state = {"model": nnx.state(model), "key": jax.random.key(3), "count": np.int32(7)}
    kernel = np.asarray(model.head.kernel[...])
    read, hashes = [], []
    for sizes in MESHES:
        mesh = mesh_of(*sizes)
        mine = sharding.process_rows(ROWS, mesh)
        read.append(mine.tolist())
        by_rows = {name: rows[mine] for name, rows in whole.items()}
        for placed in (
            sharding.place_batch(by_rows, mesh, ROWS),
            sharding.place_batch(whole, mesh),
        ):
            for name, array in placed.items():
                assert array.sharding.spec == sharding.batch_partition(name)
                np.testing.assert_array_equal(sharding.whole(array), whole[name])
        on_mesh = sharding.place(state, mesh)
        np.testing.assert_array_equal(sharding.whole(on_mesh["model"].head.kernel[...]), kernel)
        draw = jax.jit(jax.random.uniform, out_shardings=jax.NamedSharding(mesh, jax.P()))
        assert float(draw(on_mesh["key"])) == float(jax.random.uniform(jax.random.key(3)))
        hashes.append(tree_hash(on_mesh))
    print(json.dumps({"rows": read, "hashes": [tree_hash(state), *hashes]}))
    distributed.finish()


if __name__ == "__main__":
    sys.exit(main())
