"""Tokenise and pack stage 1's text once: python launch/prepare.py --config=FILE.py:NAME --to=DIR

The config is that of launch/train.py, which takes the folder by --config.adaptation_text=DIR. The
same command again goes on where it stopped, and makes damaged files anew.
"""

import os

from absl import flags

from mtllm_jax import cli
from mtllm_jax.config import MTLLM

_TO = flags.DEFINE_string("to", None, "local folder to be written; new, empty, or begun before")
_WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count() or 1, "processes that tokenise and pack; 0: this one"
)
_FIT_LENGTHS = flags.DEFINE_bool(
    "fit_lengths", False, "the longer of the config's two lengths, the other by the texts' ratio"
)


def main(config: MTLLM) -> None:
    """Hand the flags over."""
    if not _TO.value:
        raise ValueError("--to is missing; name the folder to be written, --to=DIR.")
    if _WORKERS.value < 0:
        raise ValueError(f"--workers is {_WORKERS.value}; it must be 0 (this process) or above.")
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.metrics import Console
    from mtllm_jax.recipes import prepare

    prepare.run(
        config,
        _TO.value,
        workers=_WORKERS.value,
        fit_lengths=_FIT_LENGTHS.value,
        console=Console(),
    )


if __name__ == "__main__":
    cli.run_main(main, __doc__, cli.of_mtllm)
