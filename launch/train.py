"""Train by a recipe: python launch/train.py --config=configs/mtllm.py[:NAME] [--config.seed=1 ...]

The same command again goes on where it stopped; on a finished run it prints the table.
"""

import contextlib
import importlib
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import flags

from mtllm_jax import cli
from mtllm_jax.config import MTLLM
from mtllm_jax.runfolder import RunFolder

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (runs/RECIPE-NAME)")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "load, check and step once; leave nothing behind")

RECIPES = {"mtllm": (MTLLM, "mtllm_jax.recipes.mtllm")}


def schema(values: Mapping[str, Any]) -> type:
    """The config class of the recipe that a config file names."""
    recipe = values.get("recipe")
    if recipe not in RECIPES:
        raise ValueError(f"config.recipe is {recipe!r}; it must be one of {', '.join(RECIPES)}.")
    return RECIPES[recipe][0]


def workdir(config: MTLLM) -> contextlib.AbstractContextManager[str]:
    """The run's folder, or for a dry run one that is gone afterwards."""
    if _DRY_RUN.value:
        return tempfile.TemporaryDirectory(prefix="mtllm-dry-run-")
    return contextlib.nullcontext(_WORKDIR.value or f"runs/{config.recipe}-{config.name}")


def main(config: MTLLM) -> None:
    """Run the recipe in its folder, or show what a finished run found."""
    with workdir(config) as path:
        folder = RunFolder(path, cli.to_dict(config))
        # Late, so that a mistake at the door is answered before anything heavy is imported.
        from mtllm_jax.metrics import Console
        from mtllm_jax.results import results_table

        console = Console()
        if folder.is_finished():
            results = folder.read_json("results.json")
            console.print(results_table(results, folder.path, console.width))
            return
        recipe = importlib.import_module(RECIPES[config.recipe][1])
        recipe.run(config, folder, console, dry_run=_DRY_RUN.value)


if __name__ == "__main__":
    cli.run_main(main, __doc__, schema, resumes=lambda: not _DRY_RUN.value)
