"""Train by a recipe: python launch/train.py --config=configs/mtllm.py[:NAME] [--config.seed=1 ...]

Recipes are configs/mtllm.py and configs/sdrrl.py.

The same command again goes on where it stopped; on a finished run it prints the table.
"""

import importlib

from absl import flags
from etils import epath

from mtllm_jax import cli, distributed
from mtllm_jax.config import MTLLM, SDRRL
from mtllm_jax.runfolder import RunFolder, finished_results

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (runs/RECIPE-NAME)")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "load, check and step once; leave nothing behind")
_COMPILED = flags.DEFINE_string("compile_cache", None, "of compiled programs (WORKDIR/compiled)")
_TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "write event files in each stage's folder")
_WANDB = flags.DEFINE_string("wandb", "", "project of Weights & Biases that metrics go to")
_PROFILE = flags.DEFINE_string("profile", None, "steps to be profiled, as adaptation:100-110")


def main(config: MTLLM | SDRRL) -> None:
    """Run the recipe in its folder, or show what a finished run found; as one of several processes
    where the environment says so."""
    values = cli.to_dict(config)
    path = _WORKDIR.value or f"runs/{config.recipe}-{config.name}"
    distributed.start()
    results = None
    if not _DRY_RUN.value:
        results = distributed.by_first(lambda: finished_results(path, values))
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.metrics import Console
    from mtllm_jax.results import results_table
    from mtllm_jax.watch import Watch, keep_compiled, parse_profile

    console = Console()
    if results is not None:
        console.print(results_table(results, epath.Path(path), console.width))
        return
    recipe = importlib.import_module(f"mtllm_jax.recipes.{config.recipe}")
    profile = parse_profile(_PROFILE.value) if _PROFILE.value else None
    watch = Watch(tensorboard=_TENSORBOARD.value, wandb=_WANDB.value, profile=profile)
    watch.check(config.steps())
    if not _DRY_RUN.value:
        keep_compiled(_COMPILED.value, path)
    if idle := recipe.idle_fields(config, cli.overridden()):
        console.warn(idle)
    inputs = recipe.read_inputs(config, recipe.revisions_of(path))
    if _DRY_RUN.value:
        recipe.dry_run(inputs, console)
    else:
        recipe.run(config, inputs, RunFolder(path, values), console, watch)


if __name__ == "__main__":
    cli.run_main(main, __doc__, cli.of_recipe, resumes=lambda: not _DRY_RUN.value)
