"""Label texts in any language: python launch/predict.py --model=RUN --input=FILE --output=FILE

In: columns text, language (a FLORES-200 code), perhaps text_pair, or for multiple choice question
and choices, and any others, which are kept. Out: the rows with prediction (a label, or the number
of a choice) and probabilities, or with a vector. The same command again goes on where it stopped.
Rows without an answer go to OUTPUT.rejects.jsonl with the reason.
"""

from absl import flags

from mtllm_jax import cli, distributed

_MODEL, _BATCH_ROWS, _FSDP = cli.model_flags()
_INPUT = flags.DEFINE_string(
    "input", None, ".jsonl, .jsonl.gz, .csv, .tsv or .parquet; -: JSON lines on standard input"
)
_OUTPUT = flags.DEFINE_string("output", None, ".jsonl or .parquet, to be written")
_VECTORS = flags.DEFINE_bool("vectors", False, "the stack's vectors in the place of labels")
_LANGUAGE = flags.DEFINE_string("language", "", "FLORES-200 code of rows that do not say theirs")


def main() -> None:
    """Check the flags, then hand them over; as one of several processes where the environment says
    so."""
    model, rows, output = _MODEL.value, _INPUT.value, _OUTPUT.value
    if not model or not rows or not output:
        missing = "output" if model and rows else "input" if model else "model"
        raise ValueError(
            f"--{missing} is missing; what is needed is --model=RUN --input=FILE --output=FILE."
        )
    distributed.start()
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.metrics import Console
    from mtllm_jax.predict import predict

    predict(
        model,
        rows,
        output,
        vectors=_VECTORS.value,
        language=_LANGUAGE.value,
        batch_rows=_BATCH_ROWS.value,
        fsdp=_FSDP.value,
        console=Console(),
    )


if __name__ == "__main__":
    cli.run_main(main, __doc__)
