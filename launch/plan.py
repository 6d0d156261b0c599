"""What a run will cost: python launch/plan.py --config=FILE.py:NAME --topology=v5e:4x4

Memory, FLOPs, traffic and time of MT-LLM's stage 1 or SDRRL's tuning on machines that need not be
here. For TPUs the step is compiled, where `pip install -e '.[plan]'` has brought their compiler.
"""

from absl import flags

from mtllm_jax import cli
from mtllm_jax.config import MTLLM, SDRRL

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, v6e:2x4, v5p:4x4x4, a100:8, h100:8")
_GPU = flags.DEFINE_integer("gpu", None, "one GPU of 24, 48, 80 or 141 GB; an A100 is a100:1 above")
_ENCODER = flags.DEFINE_string("encoder", "", "its size, where config.encoder is empty")
_LLM = flags.DEFINE_string("llm", "", "the same, of config.llm; both are else the recipe's")
_TEXTS = flags.DEFINE_integer("texts", 1, "texts packed in a row")
_ANALYTIC = flags.DEFINE_bool("analytic", False, "by arithmetic alone, in seconds")
_SWEEP = flags.DEFINE_bool("sweep", False, "rank meshes and remat policies, and plan the best")
_JSON = flags.DEFINE_string("json", None, "file that the same numbers are written to")


def main(config: MTLLM | SDRRL) -> None:
    """Hand the flags over."""
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.metrics import Console
    from mtllm_jax.plan import report

    options = report.Options(
        topology=_TOPOLOGY.value,
        gpu=_GPU.value,
        encoder=_ENCODER.value,
        llm=_LLM.value,
        texts=_TEXTS.value,
        analytic=_ANALYTIC.value,
        sweep=_SWEEP.value,
        json=_JSON.value,
    )
    report.run(config, options, Console())


if __name__ == "__main__":
    cli.run_main(main, __doc__, cli.of_recipe, resumes=lambda: False)
