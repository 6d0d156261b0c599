"""Score a model in many languages: python launch/evaluate.py --model=RUN --task=NAME --data=PATH

RUN: a finished run, or what launch/export.py wrote. --test=FILE in the place of --task: rows of
your own, columns text (and text_pair, or question and choices), label, language. The same command
again goes on where it stopped; with --against=PREDICTIONS.jsonl|RUN it compares, row by row,
without answering again.

An LLM's folder, or its name on the hub, in the place of RUN is asked by prompts:
--task=mgsm, belebele_letters, belebele_generated, xcopa, mkqa, xlsum, flores, ntrex.
"""

from absl import flags

from mtllm_jax import cli, distributed

_MODEL, _BATCH_ROWS, _FSDP = cli.model_flags()
_TASK = flags.DEFINE_string("task", "", "a published benchmark: sib200, nusax, xnli, …")
_DATA = flags.DEFINE_string("data", "", "of --task: the folder of its files")
_ENGLISH_DATA = flags.DEFINE_string(
    "english_data", "", "of --task: the folder of its rows in English, where it has none itself"
)
_TEST = flags.DEFINE_string("test", "", "rows of your own, in the place of --task")
_LANGUAGES = flags.DEFINE_list("languages", ["all"], "FLORES-200 codes; all: those there are")
_LIMIT = flags.DEFINE_integer("limit", None, "rows of each language, labels in proportion (all)")
_AGAINST = flags.DEFINE_string("against", "", "predictions of another system: a file, or a run")
_PROMPT = flags.DEFINE_string("prompt", "", "of an LLM: a file with {fields} (the package's)")
_TEMPLATE = flags.DEFINE_string(
    "template", "", "of an LLM: chat, alpaca, llama2 or none around a prompt (chat if it has one)"
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "of an LLM: tokens of an answer (by task)"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "of an LLM: of weights and products (float32)"
)
_SPM = flags.DEFINE_string("spm", "", "of an LLM: a sentencepiece model, for spBLEU and ROUGE")
_OF_LLMS = (_PROMPT, _TEMPLATE, _MAX_NEW_TOKENS, _DTYPE, _SPM)
_TO = flags.DEFINE_string("to", "", "folder to be written (evaluations/NAME-MODEL)")


def main() -> None:
    """Hand the flags over; as one of several processes where the environment says so."""
    if not _MODEL.value:
        raise ValueError("--model is missing; it must be the folder of a run, or an export.")
    distributed.start()
    # Late, so that a mistake at the door is answered before anything heavy is imported.
    from mtllm_jax.asking import evaluate as asking
    from mtllm_jax.asking.answering import Means
    from mtllm_jax.evaluate import Source, evaluate
    from mtllm_jax.metrics import Console

    languages = () if _LANGUAGES.value == ["all"] else tuple(_LANGUAGES.value)
    source = Source(
        task=_TASK.value,
        data=_DATA.value,
        english_data=_ENGLISH_DATA.value,
        test=_TEST.value,
        languages=languages,
        limit=_LIMIT.value,
    )
    if asking.is_llm(_MODEL.value, _TASK.value):
        asking.evaluate(
            _MODEL.value,
            source,
            asking.How(_PROMPT.value, _TEMPLATE.value, _MAX_NEW_TOKENS.value, _SPM.value),
            against=_AGAINST.value,
            to=_TO.value,
            means=Means(_BATCH_ROWS.value, _FSDP.value, _DTYPE.value or "float32"),
            console=Console(),
        )
        return
    for flag in _OF_LLMS:
        if flag.value not in ("", None):
            raise ValueError(f"--{flag.name} has no effect: --model={_MODEL.value} is no LLM.")
    evaluate(
        _MODEL.value,
        source,
        against=_AGAINST.value,
        to=_TO.value,
        batch_rows=_BATCH_ROWS.value,
        fsdp=_FSDP.value,
        console=Console(),
    )


if __name__ == "__main__":
    cli.run_main(main, __doc__)
