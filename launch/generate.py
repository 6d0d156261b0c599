"""Let an LLM answer prompts: python launch/generate.py --model=LLM --input=FILE --output=FILE

In: a column prompt, perhaps id, and any others, which are kept. Out: the rows with answer, and with
ended, false where an answer was cut. The same command again goes on where it stopped. Rows that
cannot be answered go to OUTPUT.rejects.jsonl with the reason.
"""

from absl import flags

from mtllm_jax import cli, distributed

_MODEL, _BATCH_ROWS, _FSDP = cli.model_flags(
    "an LLM: its folder, or its name on the hub", 32, "prompts that a device answers at a time"
)
_INPUT, _OUTPUT, _DTYPE = cli.rows_flags()
_TEMPLATE = flags.DEFINE_string(
    "template", "chat", "what stands around a prompt: chat (the LLM's own), alpaca, llama2 or none"
)
_SYSTEM = flags.DEFINE_string("system", "", "what the LLM is told before each prompt")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "of an answer")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.95, "0: always the likeliest token")
_TOP_K = flags.DEFINE_integer("top_k", 50, "draw from so many of the likeliest; 0: from all")
_TOP_P = flags.DEFINE_float("top_p", 0.7, "draw from the likeliest that hold this share; 1: all")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "above 1: repeats are rarer")
_STOP = flags.DEFINE_list("stop", [], "tokens that end an answer, beside the model's own")
_SEED = flags.DEFINE_integer("seed", 0, "of what is drawn")


def main() -> None:
    """Check the flags, then hand them over; as one of several processes where the environment says
    so."""
    model, rows, output = _MODEL.value, _INPUT.value, _OUTPUT.value
    if not model or not rows or not output:
        missing = "output" if model and rows else "input" if model else "model"
        raise ValueError(
            f"--{missing} is missing; what is needed is --model=LLM --input=FILE --output=FILE."
        )
    distributed.start()
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.generate import Decoding, generate
    from mtllm_jax.metrics import Console
    from mtllm_jax.sampling import Sampling

    how = Decoding(
        template=_TEMPLATE.value,
        system=_SYSTEM.value,
        sampling=Sampling(
            _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _REPETITION_PENALTY.value
        ),
        max_new_tokens=_MAX_NEW_TOKENS.value,
        stop=tuple(_STOP.value),
        seed=_SEED.value,
        batch_rows=_BATCH_ROWS.value,
        dtype=_DTYPE.value,
    )
    generate(model, rows, output, how, fsdp=_FSDP.value, console=Console())


if __name__ == "__main__":
    cli.run_main(main, __doc__)
