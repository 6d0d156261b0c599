"""Stage 1's rows, made before a run and apart from it: what `launch/prepare.py` does."""

from mtllm_jax.config import MTLLM, naming
from mtllm_jax.data.packing import Rows, fitting_lengths
from mtllm_jax.data.prepare import maker_of, prepare
from mtllm_jax.data.prepared import holds_rows
from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer
from mtllm_jax.hf.files import local_files
from mtllm_jax.languages import check_language
from mtllm_jax.metrics import Console, Progress
from mtllm_jax.recipes.inputs import locate_models, read_probe, read_task, unseen_texts
from mtllm_jax.recipes.job import stage_seed
from mtllm_jax.runfolder import is_remote

_FULL = 0.975  # of a stream, above which other lengths are not worth a word


def run(config: MTLLM, to: str, *, workers: int, fit_lengths: bool, console: Console) -> None:
    """Tokenise and pack the config's English text into the folder `to`, going on where an earlier
    start stopped.

    Texts of the test rows of the config's task and of its probe are left out, where it names them.
    fit_lengths:
    choose the lengths of rows by the ratio of the texts' tokens. Raises ValueError,
    naming the field or the flag, for what cannot be read, or a folder of something else.
    """
    if is_remote(to):
        raise ValueError(f"--to={to} is remote; it must be a local folder, to be copied from.")
    for field in ("encoder", "llm", "adaptation_text"):
        if not (value := getattr(config, field)):
            raise ValueError(
                f"config.{field} is {value!r}; text is prepared for models that are there."
            )
    for text in config.adaptation_text:
        if holds_rows(text):
            raise ValueError(
                f"config.adaptation_text: {text} is prepared already; give it to launch/train.py."
            )
    if fit_lengths and not config.adaptation.training.packing:
        raise ValueError(
            "--fit_lengths has no effect with config.adaptation.training.packing False, where a row"
            " is one text."
        )
    config, _ = locate_models(config, {}, weights=False)
    with naming("encoder"):
        source = source_tokenizer(
            local_files(config.encoder), legacy_source_order=config.legacy_source_order
        )
    with naming("llm"):
        target = TargetTokenizer(local_files(config.llm))
    with naming("english"):
        check_language(config.english, source.languages)
    if alpha := config.adaptation.subword_sampling:
        with naming("adaptation.subword_sampling"):
            source.encode(["a"], config.english, sampling_alpha=alpha)
    if field := config.adaptation.aligned_by:
        with naming(f"adaptation.{field}"):
            source.encode_ends(["a"], config.english)
    task = read_task(config, source.languages) if config.task.given else None
    texts, note = unseen_texts(config, task, read_probe(config, source.languages))
    if note:
        console.print(note)
    maker = maker_of(config, source, target, stage_seed(config.seed, "adaptation"))
    if fit_lengths:
        maker = maker.fitted(texts)
    bar: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(console.progress(total, "preparing", unit="texts", done=done))
        bar[0].update(done)

    prepared = prepare(to, maker, texts, workers=workers, progress=progress)
    rows = prepared.rows()
    console.print(rows.told())
    if maker.packing and not fit_lengths and min(rows.fill.values()) < _FULL:
        _suggest(rows, console)
    training = config.adaptation.training
    flags = [f"--config.adaptation_text={to}"] + [
        f"--config.adaptation.training.{side}_length={length}"
        for side in ("source", "target")
        if (length := maker.lengths[side]) != getattr(training, f"{side}_length")
    ]
    console.print(f"Train on it with {' '.join(flags)}")


def _suggest(rows: Rows, console: Console) -> None:
    fitted = fitting_lengths(rows.counts.tokens, rows.lengths)
    if fitted != rows.lengths:
        console.print(
            f"Rows of {fitted['source']} encoder tokens and {fitted['target']} LLM tokens would"
            " follow these texts and be fuller: --fit_lengths, with another --to."
        )
