"""A stage for tests to stop: python stoppable_stage.py FOLDER SECONDS_PER_BATCH

Noise, accumulation and packed rows: all whose place must come back. A batch takes its time, so
that the parent process can stop it where it wants.
"""

import dataclasses
import sys
import time

import tiny
from etils import epath

from mtllm_jax import config, sharding
from mtllm_jax.data.pipeline import add_by_example
from mtllm_jax.interrupt import Interrupted
from mtllm_jax.metrics import Console
from mtllm_jax.runfolder import StageFolder
from mtllm_jax.train import fit

STEPS = 30
TRAINING = dataclasses.replace(
    tiny.TRAINING, steps=STEPS, batch_rows=4, accumulation=2, checkpoint_every=7
)


def main(folder: str, seconds: float) -> None:
    noisy = config.Distillation(
        training=TRAINING, start="stage1", noise_position=0.3, noise_text=0.4
    )
    stage = tiny.distillation(tiny.settings(distillation=noisy))
    add = add_by_example(stage.tables)

    def slowly(batch):
        time.sleep(seconds)
        return add(batch)

    fit(
        StageFolder(epath.Path(folder)),
        "a stage",
        TRAINING,
        objective=stage.objective,
        trainable=stage.trainable,
        frozen=stage.frozen,
        rows=stage.rows,
        mesh=sharding.make_mesh(config.Mesh()),
        seed=5,
        console=Console(),
        add=slowly,
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1], float(sys.argv[2]))
    except Interrupted as where:
        sys.exit(f"interrupted: {where}")
