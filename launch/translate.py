"""Translate rows: python launch/translate.py --model=NLLB --source=eng_Latn --target=swh_Latn,…

In: the columns named by --columns, and any others, which are kept. Out: for each row and target the
row translated, line breaks, list marks, code, URLs, numbers and placeholders as they were. The same
command again goes on where it stopped. OUTPUT.dropped.jsonl holds what came to no translation, with
the reason, and OUTPUT.about.json the counts.
"""

from absl import flags

from mtllm_jax import cli, distributed

_MODEL, _BATCH_ROWS, _FSDP = cli.model_flags(
    "an NLLB or M2M100 model: a folder, or org/name", 64, "sentences translated at a time"
)
_INPUT, _OUTPUT, _DTYPE = cli.rows_flags()
_SOURCE = flags.DEFINE_string("source", "eng_Latn", "FLORES-200 code of the rows")
_TARGET = flags.DEFINE_list("target", None, "FLORES-200 codes to translate into, with commas")
_COLUMNS = flags.DEFINE_list("columns", ["text"], "to translate; the first is never blank")
_LEAST_LENGTH = flags.DEFINE_float("least_length", 0.3, "letters of a translation / its source's")
_MOST_LENGTH = flags.DEFINE_float("most_length", 3.0, "the same, at most")
_MOST_COPIED = flags.DEFINE_float("most_copied", 0.8, "share of letters in words of the source")
_LANGUAGE = flags.DEFINE_bool("check_language", True, "drop what is in another language")
_TASKS = flags.DEFINE_bool("check_tasks", True, "drop tasks that a translation spoils")
_BEAMS = flags.DEFINE_integer("num_beams", 4, "hypotheses that are searched over; 1: greedy")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "tokens of a sentence")
_MAX_NEW = flags.DEFINE_integer("max_new_tokens", 512, "tokens of its translation")


def main() -> None:
    """Check the flags, then hand them over; as one of several processes where the environment says
    so."""
    model, targets, rows, output = _MODEL.value, _TARGET.value, _INPUT.value, _OUTPUT.value
    if not model or not targets or not rows or not output:
        given = {"model": model, "target": targets, "input": rows, "output": output}
        missing = next(name for name, value in given.items() if not value)
        raise ValueError(
            f"--{missing} is missing; what is needed is --model=NLLB --target=CODE,… --input=FILE"
            " --output=FILE."
        )
    distributed.start()
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.data.translation_filters import Filters
    from mtllm_jax.metrics import Console
    from mtllm_jax.translate import Decoding, translate

    translate(
        model,
        rows,
        output,
        source=_SOURCE.value,
        targets=targets,
        columns=_COLUMNS.value,
        filters=Filters(
            least_length=_LEAST_LENGTH.value,
            most_length=_MOST_LENGTH.value,
            most_copied=_MOST_COPIED.value,
            language=_LANGUAGE.value,
            tasks=_TASKS.value,
        ),
        decoding=Decoding(
            max_length=_MAX_LENGTH.value,
            max_new_tokens=_MAX_NEW.value,
            num_beams=_BEAMS.value,
            batch_rows=_BATCH_ROWS.value,
            dtype=_DTYPE.value,
            fsdp=_FSDP.value,
        ),
        console=Console(),
    )


if __name__ == "__main__":
    cli.run_main(main, __doc__)
