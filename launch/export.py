"""Write a finished run as a Hugging Face folder: python launch/export.py --workdir=RUN --to=DIR

hf: the whole stack, for PyTorch, or as it is after stage 1, for tasks to begin with; peft: what the
LLM learnt, as an adapter; llama, nllb: the LLM and the MT model that the run started from.
"""

from absl import flags

from mtllm_jax import cli

FORMATS = ("hf", "peft", "llama", "nllb")
DTYPES = ("float32", "bfloat16", "float16")

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the finished run")
_TO = flags.DEFINE_string("to", None, "folder to be written; it must be new or empty")
_FORMAT = flags.DEFINE_enum("format", "hf", FORMATS, ", ".join(FORMATS))
_ADAPTERS = flags.DEFINE_enum(
    "adapters", None, ("merged", "kept"), "of hf: LoRA merged into the weights (merged), or kept"
)
_RANK = flags.DEFINE_integer(
    "rank", None, "of peft, where all layers were trained: rank of the adapter (none: full)"
)
_STAGE = flags.DEFINE_enum(
    "stage",
    None,
    ("adaptation", "distillation"),
    "of hf: after which the stack is written (distillation); adaptation is stage 1, without a head",
)
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, f"{', '.join(DTYPES)} (as in the run)")


def main() -> None:
    """Check the flags, then hand them over."""
    workdir, to = _WORKDIR.value, _TO.value
    if not workdir or not to:
        missing = "to" if workdir else "workdir"
        raise ValueError(f"--{missing} is missing; what is needed is --workdir=RUN --to=DIR.")
    given = {
        "adapters": (_ADAPTERS.value, "hf"),
        "rank": (_RANK.value, "peft"),
        "stage": (_STAGE.value, "hf"),
    }
    for name, (setting, owner) in given.items():
        if setting is not None and _FORMAT.value != owner:
            raise ValueError(f"--{name} has no effect with --format={_FORMAT.value}.")
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.export import export
    from mtllm_jax.metrics import Console

    export(
        workdir,
        to,
        _FORMAT.value,
        adapters=_ADAPTERS.value or "merged",
        rank=_RANK.value,
        dtype=_DTYPE.value,
        console=Console(),
        stage=_STAGE.value or "distillation",
    )


if __name__ == "__main__":
    cli.run_main(main, __doc__)
