"""A stage for tests to stop: python stoppable_stage.py --folder=FOLDER [--hold=N] [--workers=W]

All whose place must come back is on: shuffled and packed rows, accumulation, noise, dropout.
It enters by the door of every command, as one of several processes where the environment says so.
"""

import dataclasses
import functools
import time

import jax
import tiny
from absl import flags
from etils import epath

from mtllm_jax import cli, config, distributed, sharding
from mtllm_jax.interrupt import last_stop
from mtllm_jax.metrics import Console
from mtllm_jax.runfolder import StageFolder
from mtllm_jax.train import fit

FOLDER = flags.DEFINE_string("folder", None, "of the stage")
HOLD = flags.DEFINE_integer("hold", -1, "batches that this start is given before it waits")
WORKERS = flags.DEFINE_integer("workers", 0, "processes that read rows")

STEPS = 40
TRAINING = dataclasses.replace(
    tiny.TRAINING, steps=STEPS, batch_rows=8, accumulation=2, checkpoint_every=7
)


@functools.cache
def stage():
    noisy = config.Adaptation(training=TRAINING, noise_position=0.3, noise_text=0.4)
    lora = config.LoRA(rank=4, alpha=8, dropout=0.1, targets=("all",))
    return tiny.adaptation(tiny.settings(trained="lora", adaptation=noisy, lora=lora))


def hold(folder):
    """An `add` that waits at batch `--hold` + 1 until it is asked to stop, or its mark is gone."""
    given = 0

    def add(batch):
        nonlocal given
        if given == HOLD.value:
            mark = folder / f"held-{jax.process_index()}"
            mark.touch()
            while mark.exists() and not last_stop().requested:
                time.sleep(0.01)
            mark.unlink(missing_ok=True)
        given += 1
        return batch

    return add


def main():
    distributed.start()
    folder = epath.Path(FOLDER.value)
    sharding.SMALLEST_SHARDED = 500  # these weights are small, and are to be cut all the same
    made = stage()
    fit(
        StageFolder(folder),
        "a stage",
        dataclasses.replace(TRAINING, workers=WORKERS.value),
        objective=made.objective,
        trainable=made.trainable,
        frozen=made.frozen,
        rows=made.rows,
        mesh=sharding.make_mesh(config.Mesh(data=1, fsdp=-1)),
        seed=5,
        console=Console(),
        add=lambda: hold(folder),
    )


if __name__ == "__main__":
    cli.run_main(main, __doc__)
