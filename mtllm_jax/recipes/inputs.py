"""What a run of MT-LLM reads: opened and checked at the door, before anything is written."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from flax import nnx

from mtllm_jax import sharding
from mtllm_jax.config import MTLLM, SDRRL, SIDES, Adaptation, Training, naming, require
from mtllm_jax.data.babel import check_languages
from mtllm_jax.data.benchmarks import (
    STAND_INS,
    Benchmark,
    Bitext,
    read_benchmark,
    read_bitext,
    read_own,
    source_language,
)
from mtllm_jax.data.prepare import draws_of, maker_of
from mtllm_jax.data.prepared import Prepared, holds_rows, is_prepared
from mtllm_jax.data.texts import Texts, read_texts
from mtllm_jax.data.tokenise import (
    NllbTokenizer,
    SourceTokenizer,
    TargetTokenizer,
    source_tokenizer,
    translation_tokenizer,
)
from mtllm_jax.hf.encoder import ENCODERS, TRANSLATORS, check_encoder, has_decoder
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.folder import read_config
from mtllm_jax.hf.llama import check_llama
from mtllm_jax.hf.locate import locate
from mtllm_jax.hf.nllb import check_nllb
from mtllm_jax.hf.peft import check_peft
from mtllm_jax.languages import ENGLISH, LANGUAGES, check_language
from mtllm_jax.models import lora, quantised
from mtllm_jax.models.bert import BertConfig
from mtllm_jax.models.layers import Linear
from mtllm_jax.models.llama import FAMILIES, Llama, LlamaConfig
from mtllm_jax.ops.attention import check_attention
from mtllm_jax.recipes.prompting import longest_row
from mtllm_jax.runfolder import read_json
from mtllm_jax.tasks.prompt import check_prompt, kind_of
from mtllm_jax.tasks.task import Row, Task, texts_in

REVISIONS = "revisions.json"  # in a run folder: {field: commit} of models named on the hub

# The fields that name models, and the model_types that each may be of.
_MODELS = {"encoder": ENCODERS, "llm": FAMILIES, "translator": TRANSLATORS}


# What a stage 1 without steps makes no use of; `adaptation.training.steps` itself it does.
_ADAPTING = (
    "adaptation_text",
    *(
        f"adaptation.{field.name}"
        for field in dataclasses.fields(Adaptation)
        if field.name != "training"
    ),
    *(
        f"adaptation.training.{field.name}"
        for field in dataclasses.fields(Training)
        if field.name != "steps"
    ),
)

# Those of them that MNTP and SimCSE, which learn from the same text, make use of.
_PREPARING = (
    "adaptation_text",
    "adaptation.mixture",
    "adaptation.dev_texts",
    "adaptation.training.evaluate_every",
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The devices, and what the user brought: None where the embedded text is taken.

    config: as given, but folders in the place of names on the Hugging Face hub. revisions: the
    commits that those names stood for, by field.
    """

    config: MTLLM
    revisions: Mapping[str, str]
    mesh: jax.sharding.Mesh
    task: Task | None
    adaptation_text: Texts | Prepared | None
    bitext: Bitext | None = None  # of config.probe
    notes: Sequence[str] = ()  # on text and bitext, as those of a task


def read_inputs(config: MTLLM, revisions: Mapping[str, str] = {}) -> Inputs:
    """Open all that the config names, the cheapest first.

    revisions: commits that names on the hub are to stand for, by field, where a run has begun with
    them; others are looked up. Raises ValueError, naming the field and where there is one the file
    and the line, for whatever would stop a stage later: devices, models, tokenizers, languages,
    rows and texts. Reads no weights and, but for what is fetched from the hub, writes nothing.
    """
    _check_sources(config)
    locate_models(config, revisions, weights=False)
    mesh = checked_mesh(config)
    sharding.check_rows(config.evaluation.batch_rows, mesh, "evaluation.batch_rows")
    if config.frozen_dtype == "int8":
        with naming("frozen_dtype"):
            quantised.check_available()
    if config.trained != "all" or _prepares_llm(config):
        lora_targets(config)
    if "simcse.training" in config.stages() and config.simcse.dropout:
        with naming("simcse.dropout"):
            check_attention(config.attention, drops=True)
    config, revisions = locate_models(config, revisions)
    if config.llm:
        _check_llm(config)
    source = _check_encoder(config) if config.encoder else None
    if source is None and config.mini_nllb is not None:
        _check_encoder_layers(config, config.mini_nllb.encoder_layers)
    readable = source.languages if source else (config.english, *config.languages)
    if config.uses_embedded_text():
        with naming("languages"):
            check_languages(config.languages)
    if not config.task.given:
        with naming("languages"):
            for code in config.languages:
                check_language(code, readable)
    task = read_task(config, readable) if config.task.given else None
    if task is not None and task.num_choices:
        why = "1 for multiple choice, which pools the encoder's own positions"
        require(config.bridge.stride == 1, "bridge.stride", config.bridge.stride, why)
    if config.evaluation.prompt:
        with naming("evaluation.prompt"):
            check_prompt(config.evaluation.prompt, kind_of(task.train[0]) if task else "text")
    tokenizers = [source]
    tests = task.tests.values() if task else []
    evaluated = {row["language"] for rows in tests for row in rows} or {*config.languages}
    if by_llm := config.evaluation.llm_languages:
        with naming("evaluation.llm_languages"):
            for code in by_llm:
                check_language(code, dict.fromkeys((*LANGUAGES, *STAND_INS, *evaluated)))
        told = f"() or codes among those evaluated, such as {min(evaluated - {config.english})}"
        some = not evaluated.isdisjoint({*by_llm} - {config.english})
        require(some, "evaluation.llm_languages", by_llm, told)
    if task is not None and config.llm and "llm_prompted" in config.evaluation.systems:
        _check_window(config, task, mesh)
    if config.translator:
        tokenizers.append(_check_translator(config, sorted(evaluated)))
    if config.legacy_source_order and config.encoder:
        two_orders = any(isinstance(tokenizer, NllbTokenizer) for tokenizer in tokenizers)
        require(two_orders, "legacy_source_order", True, "False where no tokenizer is NLLB's")
    bitext = read_probe(config, readable)
    text, note = None, ""
    if config.adaptation_text and config.reads_english:
        text, note = _read_adaptation_text(config, source, task, bitext)
    if config.adaptation.training.evaluate_every and config.reads_english:
        _check_held_out(config, text)
    if config.stage1 and (task or bitext):
        note = "What stage 1 has read before was not searched for texts of this test or probe."
    notes = [*(bitext.notes if bitext else ()), *([note] if note else [])]
    return Inputs(config, revisions, mesh, task, text, bitext, notes)


def revisions_of(run: str | os.PathLike[str]) -> dict[str, str]:
    """The commits that an earlier start of a run found behind names on the hub, by field."""
    path = epath.Path(run) / REVISIONS
    return read_json(path) if path.exists() else {}


def checked_mesh(config: MTLLM | SDRRL) -> jax.sharding.Mesh:
    """The config's devices. ValueError unless each stage's rows, and the kernels of attention, can
    be laid over them."""
    mesh = sharding.make_mesh(config.mesh)
    for where, training in config.stages().items():
        sharding.check_rows(training.batch_rows, mesh, f"{where}.batch_rows", training.accumulation)
        for side in SIDES[where]:
            field = f"{side}_length"
            sharding.check_length(getattr(training, field), mesh, f"{where}.{field}")
    with naming("attention"):
        check_attention(
            config.attention,
            jax.default_backend(),
            segments=any(training.packing for training in config.stages().values()),
            dtype=config.compute_dtype,
            context=config.mesh.context,
        )
    return mesh


def locate_models(
    config: MTLLM, revisions: Mapping[str, str], *, weights: bool = True
) -> tuple[MTLLM, dict[str, str]]:
    """The config with a folder for each model and adapter that it names, and the commits of those
    on the hub.

    weights: False fetches what describes the models alone; also checks that they are of a family
    that is read here, which is known before any weights are fetched. ValueError names the field.
    """
    folders: dict[str, Any] = {}
    found: dict[str, str] = {}

    def folder_of(name: str, key: str) -> str:
        checkpoint = locate(name, revisions.get(key), weights=weights)
        if checkpoint.revision is not None:
            found[key] = checkpoint.revision
        return os.fspath(checkpoint.folder)

    for field, families in _MODELS.items():
        if name := getattr(config, field):
            with naming(field):
                folders[field] = folder_of(name, field)
                read_config(folders[field], families)
    with naming("llm_adapters"):
        folders["llm_adapters"] = tuple(
            folder_of(name, adapter_key(i)) for i, name in enumerate(config.llm_adapters)
        )
    if config.trained == "lora" and config.lora.start:
        with naming("lora.start"):
            start = folder_of(config.lora.start, "lora.start")
        folders["lora"] = dataclasses.replace(config.lora, start=start)
    return dataclasses.replace(config, **folders), found


def adapter_key(i: int) -> str:
    """What adapter number `i` of the LLM is called among the revisions of a run."""
    return f"llm_adapters.{i}"


def read_task(config: MTLLM, readable: Sequence[str]) -> Task:
    """The user's own task. readable: the languages that the encoder knows; () = all there are."""
    source, english = config.task, config.english
    with naming("task"):
        if source.benchmark:
            read = read_benchmark(
                source.benchmark,
                source.data,
                languages=source.languages or "all",
                english=english,
                english_data=source.english_data or None,
                translations=source.translations or None,
                splits=("train", "dev", "test") if config.evaluates_task else ("train", "test"),
                limit=source.limit or None,
            )
        else:
            read = read_own(
                source.train,
                source.test,
                dev=source.dev if config.evaluates_task else "",
                name=source.name,
                english=english,
                readable=[*readable, *(c for c in STAND_INS if STAND_INS[c] in readable)],
                limit=source.limit or None,
            )
        test, notes = _readable_rows(config, read, readable)
        if all(row["language"] == english for row in test):
            raise ValueError(f"{read.name} has no rows in another language than {english}")
    kept = {(row["language"], row["id"]) for row in test}
    translated = [row for row in read.translated if (row["language"], row["id"]) in kept]
    name = source.name or read.name
    tests, notes = {"test": test}, [*read.notes, *notes, *_shared_rows(read, test)]
    return Task(name, read.labels, read.train, tests, translated, tuple(notes), read.dev)


def _readable_rows(
    config: MTLLM, read: Benchmark, readable: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """The test rows in languages that were asked for and the encoder knows, and what is left out.

    ValueError for a language that was asked for by name and is not known, or has no rows.
    """
    source = config.task
    for code in source.languages:
        with naming("languages", before=""):
            check_language(code, dict.fromkeys((*read.languages, config.english)))
    unknown: dict[str, ValueError] = {}
    for code in read.languages:
        try:
            source_language(code, readable)
        except ValueError as error:
            unknown[code] = error
    asked = [code for code in source.languages if code in unknown]
    if asked:
        raise unknown[asked[0]]
    wanted = {code for code in source.languages or read.languages if code not in unknown}
    wanted |= {config.english}
    notes = []
    if left_out := [code for code in unknown if not source.languages]:
        notes = [f"Left out, as the encoder does not know them: {', '.join(left_out)}."]
    return [row for row in read.test if row["language"] in wanted], notes


def _shared_rows(read: Benchmark, test: Sequence[Row]) -> Iterable[str]:
    """A sentence each on training and development rows that are rows of the test, by their texts:
    what is measured on these is no held-out score."""
    of_test = {tuple(texts_in(row)) for row in test}
    for what, rows in (("training", read.train), ("development", read.dev)):
        if shared := sum(tuple(texts_in(row)) in of_test for row in rows):
            yield (
                f"Not held out: {shared} of the {len(rows)} {what} rows have the texts of rows of"
                " the test."
            )


def read_probe(config: MTLLM, readable: Sequence[str]) -> Bitext | None:
    """The languages of config.probe's that the encoder knows; None where nothing is asked for."""
    source = config.probe
    if not source.bitext:
        return None
    with naming("probe.data"):
        read = read_bitext(source.bitext, source.data, limit=source.limit or None)
        kept = {}
        for code, lines in read.pairs.items():
            with contextlib.suppress(ValueError):
                source_language(code, readable)
                kept[code] = lines
        if not kept:
            raise ValueError(f"{source.data} has no language that the encoder knows")
    notes = list(read.notes)
    if unknown := ", ".join(code for code in read.pairs if code not in kept):
        notes.append(f"Left out of the probe, as the encoder does not know them: {unknown}.")
    return dataclasses.replace(read, pairs=kept, notes=tuple(notes))


def idle_fields(config: MTLLM, given: Sequence[str]) -> str:
    """One line naming those of the `given` fields (dotted) that have no effect, and why; or ""."""
    reasons = {
        f"{where}.{side}_length": f"this stage reads no {side} side"
        for where, sides in SIDES.items()
        for side in ("source", "target")
        if side not in sides
    }
    for field, own in (("encoder", "mini_nllb"), ("llm", "mini_llama")):
        if name := next((name for name in (field, "stage1") if getattr(config, name)), None):
            reasons[own] = f"config.{name} names the model"
    if not config.uses_embedded_text():
        reasons |= dict.fromkeys(("text", "text_seed"), "models, texts and task are your own")
    if config.task.given:
        reasons["evaluation.split"] = "the task's test rows are what is evaluated"
        if config.encoder or config.stage1:
            reasons["languages"] = "the languages evaluated are those of the task's test rows"
    else:
        limits = ("task.name", "task.languages", "task.limit")
        reasons |= dict.fromkeys(limits, "neither config.task.benchmark nor task.train is given")
    if config.stage1:
        brought = ("adaptation", "lora.start", "mntp", "simcse")
        reasons |= dict.fromkeys(brought, "config.stage1 brings its stage 1")
    elif not config.adaptation.training.steps:
        used = _PREPARING if _prepares_llm(config) else ()
        unused = (name for name in _ADAPTING if name not in used)
        reasons |= dict.fromkeys(unused, "stage 1 is left out, of 0 steps")
    stages = {f"{where}.": training for where, training in config.stages().items()}
    for where, training in stages.items():
        if training.chosen != "average":
            reasons[f"{where}averaged"] = f"config.{where}chosen is {training.chosen!r}"
    if not config.adaptation.training.evaluate_every:
        reasons["adaptation.dev_texts"] = "config.adaptation.training.evaluate_every is 0"
    if config.distillation.learns == "labels":
        reasons["distillation.objective"] = "config.distillation.learns is 'labels'"
    if not config.evaluates_task:
        reasons["task.dev"] = "no stage of the task has evaluate_every above 0"
    systems = config.evaluation.systems
    for field, system in (
        ("mt_encoder", "mt_encoder"),
        ("evaluation.prompt", "llm_prompted"),
        ("evaluation.prompt_score", "llm_prompted"),
    ):
        if system not in systems:
            reasons[field] = f"config.evaluation.systems has no {system}"
    if not {"translate_test", "translate_train"} & set(systems):
        translating = ("translator", "evaluation.num_beams", "evaluation.max_new_tokens")
        reasons |= dict.fromkeys(translating, "config.evaluation.systems has no translate_test")
    if not {"llm_zero_shot", "llm_prompted", "translate_train"} & set(systems):
        reasons["evaluation.llm_languages"] = (
            "config.evaluation.systems has none that the LLM reads"
        )
    if "translate_test" not in systems:
        reasons["task.translations"] = "config.evaluation.systems has no translate_test"
    if config.adaptation.bridge_start == "random":
        reasons["adaptation.bridge_batches"] = "config.adaptation.bridge_start is 'random'"
    if not config.probe.bitext:
        reasons["probe.limit"] = "config.probe.bitext is empty"
    for stage in () if config.stage1 else ("mntp", "simcse"):
        steps = f"{stage}.training.steps"
        if not getattr(config, stage).training.steps:
            left_out = [name for name in given if name.startswith(f"{stage}.") and name != steps]
            reasons |= dict.fromkeys(left_out, f"config.{steps} is 0")
        elif any(map(is_prepared, config.adaptation_text)):
            rows = (f"{stage}.training.target_length", f"{stage}.training.packing")
            reasons |= dict.fromkeys(rows, "config.adaptation_text holds rows that are prepared")
    if config.trained == "all":
        reasons["lora.start"] = "config.trained is 'all'"
        if not _prepares_llm(config):
            reasons["lora.targets"] = "config.trained is 'all'"
    if config.trained == "bridge":
        reasons["lora.start"] = "config.trained is 'bridge'"
    unread = []
    if config.distillation.learns == "teacher":
        unread.append(
            (config.distillation.objective.logits_kl, "distillation", "logits_temperature")
        )
        unread.append((config.distillation.objective.contrastive, "distillation", "temperature"))
    if not config.stage1 and config.adaptation.training.steps:
        unread.append((config.adaptation.objective.contrastive, "adaptation", "temperature"))
    for weight, where, field in unread:
        if not weight:
            reasons[f"{where}.objective.{field}"] = f"its term in {where}.objective weighs nothing"
    return idle_sentence(reasons, given)


def idle_sentence(reasons: Mapping[str, str], given: Sequence[str]) -> str:
    """As `idle_fields`. reasons: why a field, or all below it, has no effect."""
    found: dict[str, list[str]] = {}
    for name in given:
        for idle, reason in reasons.items():
            if f"{name}.".startswith(f"{idle}."):
                found.setdefault(reason, []).append(f"config.{name}")
    listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in found.items())
    return listed and f"without effect here: {listed}."


def _prepares_llm(config: MTLLM) -> bool:
    """Whether adapters are trained to be merged into the LLM."""
    return not config.stages().keys().isdisjoint(("mntp.training", "simcse.training"))


def _check_sources(config: MTLLM) -> None:
    """Everything is either named by the user or made here; some settings make nothing here."""
    adaptation = config.adaptation_text or not config.reads_english
    for field, given, own, what in (
        ("encoder", config.encoder, config.mini_nllb, "the Hugging Face folder of an encoder"),
        ("llm", config.llm, config.mini_llama, "the Hugging Face folder of an LLM"),
        ("adaptation_text", adaptation, config.text, "sources of English text"),
        ("task.train", config.task.given, config.text, "a file of labelled English texts"),
    ):
        if not given and own is None:
            empty = () if field == "adaptation_text" else ""
            raise ValueError(
                f"config.{field} is {empty!r}; the settings {config.name} are for real models and"
                f" data, so it must name {what}."
            )
    start = config.lora.start if config.trained == "lora" else ""
    for field, value in (("llm_adapters", config.llm_adapters), ("lora.start", start)):
        require(not value or bool(config.llm), field, value, "empty where config.llm names no LLM")
    if config.uses_embedded_text():
        if config.text is None:
            raise ValueError(
                "config.text is none; a mini model is to be trained, which needs the embedded text."
            )
        if config.english != ENGLISH:
            raise ValueError(
                f"config.english is {config.english!r}; with the embedded text it must be"
                f" {ENGLISH!r}."
            )


def lora_targets(config: MTLLM | SDRRL) -> set[str]:
    """The names of the linear maps that config.lora.targets stands for. ValueError for others."""
    # Names do not depend on sizes, so the smallest model answers for all.
    smallest = LlamaConfig(4, 4, 1, 1, 1, 4, 4)

    def attached() -> Llama:
        llm = Llama(smallest, nnx.Rngs(0))
        targets = config.lora.targets
        lora.attach(llm, rank=1, alpha=1, dropout=0, targets=targets, rngs=nnx.Rngs(0))
        return llm

    with naming("lora.targets"):
        llm = nnx.eval_shape(attached)
    return {
        str(path[-1])
        for path, node in nnx.iter_graph(llm)
        if isinstance(node, Linear) and node.lora_a is not None
    }


def _check_llm(config: MTLLM) -> None:
    with naming("llm"):
        sizes = dataclasses.replace(check_llama(config.llm), attention=config.attention)
        tokenizer = TargetTokenizer(local_files(config.llm))
        if "mntp.training" in config.stages():
            tokenizer.mask_id()
        _check_vocabulary(config.llm, tokenizer.vocab_size, sizes.vocab_size)
    with naming("llm_adapters"):
        for folder in config.llm_adapters:
            check_peft(folder, sizes)
    if config.trained == "lora" and config.lora.start:
        with naming("lora.start"):
            _check_start(config, sizes)


def _check_window(config: MTLLM, task: Task, mesh: jax.sharding.Mesh) -> None:
    """A prompt and all that may follow it lie in the LLM's sliding window, if it has one."""
    if (window := check_llama(config.llm).sliding_window) is None:
        return
    limits, tokenizer = config.evaluation, TargetTokenizer(local_files(config.llm))
    codes = limits.llm_languages
    asked = {config.english, *codes}
    rows = [
        row for test in task.tests.values() for row in test if not codes or row["language"] in asked
    ]
    longest = longest_row(limits, tokenizer, task, rows, mesh.shape["context"])
    why = (
        f"smaller, as llm_prompted's rows of up to {longest} tokens, a prompt and all that may"
        f" follow it, must fit the LLM's sliding window of {window}"
    )
    require(longest <= window, "evaluation.max_length", limits.max_length, why)


def _check_start(config: MTLLM, sizes: LlamaConfig) -> None:
    """What the student's adapter begins as has the sizes of those that are made afresh."""
    folder, ours, targets = config.lora.start, config.lora, lora_targets(config)
    adapter = check_peft(folder, sizes, to_be_kept=True)
    if adapter.factors.keys() != targets:
        raise ValueError(
            f"{folder} has the targets {', '.join(sorted(adapter.factors))}, by config.lora.targets"
            f" they are {', '.join(sorted(targets))}; they must be the same"
        )
    for name in adapter.factors:
        ((rank, alpha),) = adapter.sizes(name)
        for field, theirs, own in (("rank", rank, ours.rank), ("alpha", alpha, ours.alpha)):
            if not math.isclose(theirs, own):
                raise ValueError(
                    f"{folder} has {field} {theirs:g} for {name}, and config.lora.{field} is"
                    f" {own:g}; they must be the same"
                )


def _check_encoder(config: MTLLM) -> SourceTokenizer:
    """Returns the encoder's tokenizer."""
    with naming("encoder"):
        sizes = dataclasses.replace(check_encoder(config.encoder), attention=config.attention)
        read = translation_tokenizer if has_decoder(config.encoder) else source_tokenizer
        tokenizer = read(local_files(config.encoder))
        _check_vocabulary(config.encoder, tokenizer.vocab_size, sizes.vocab_size)
    layers = sizes.num_layers if isinstance(sizes, BertConfig) else sizes.encoder_layers
    _check_encoder_layers(config, layers)
    with naming("english"):
        check_language(config.english, tokenizer.languages)
    if isinstance(sizes, BertConfig):
        _check_lengths(config, sizes.max_positions)
    if alpha := config.adaptation.subword_sampling:
        with naming("adaptation.subword_sampling"):
            tokenizer.encode(["a"], config.english, sampling_alpha=alpha)
    if field := config.adaptation.aligned_by:
        with naming(f"adaptation.{field}"):
            tokenizer.encode_ends(["a"], config.english)
    return tokenizer


def _check_encoder_layers(config: MTLLM, most: int) -> None:
    layers = config.encoder_layers
    require(layers <= most, "encoder_layers", layers, f"at most {most}, those of the encoder")


def _check_lengths(config: MTLLM, most: int) -> None:
    """An encoder that learnt its positions has none for longer texts."""
    lengths = {"evaluation.max_length": config.evaluation.max_length}
    for where, training in config.stages().items():
        if "source" in SIDES[where]:
            lengths[f"{where}.source_length"] = training.source_length
    for field, length in lengths.items():
        require(length <= most, field, length, f"at most {most}, what config.encoder reads")


def _check_translator(config: MTLLM, languages: Iterable[str]) -> SourceTokenizer:
    """`languages` are those that are evaluated. Returns the translator's tokenizer."""
    with naming("translator"):
        sizes = check_nllb(config.translator)
        tokenizer = translation_tokenizer(local_files(config.translator))
        _check_vocabulary(config.translator, tokenizer.vocab_size, sizes.vocab_size)
        for code in (config.english, *languages):
            source_language(code, tokenizer.languages)
    return tokenizer


def _check_vocabulary(folder: str, num_tokens: int, num_rows: int) -> None:
    if num_tokens > num_rows:
        raise ValueError(
            f"{folder}: its tokenizer has {num_tokens} tokens and its model embeds {num_rows}"
        )


def _check_held_out(config: MTLLM, text: Texts | Prepared | None) -> None:
    """What stage 1 is evaluated on is left out of what it trains on, which is to be the most."""
    if isinstance(text, Prepared):
        samplings = config.adaptation.samplings
        once = "1 where prepared rows are evaluated on: others would hold the same texts"
        require(samplings == 1, "adaptation.samplings", samplings, once)
        there = text.counts.texts - text.counts.dropped
    else:
        there = len(text) if text is not None else config.text.adaptation if config.text else 0
    count = config.adaptation.dev_texts
    half = f"at most half of the {there} English texts"
    require(2 * count <= there, "adaptation.dev_texts", count, half)


def unseen_texts(config: MTLLM, task: Task | None, bitext: Bitext | None) -> tuple[Texts, str]:
    """The texts of config.adaptation_text that are none of the task's test texts and in neither
    language of a pair of the bitext, and sentences on how many are, and on how several sources are
    mixed; "" for neither."""
    for source in config.adaptation_text:
        if holds_rows(source):
            raise ValueError(
                f"config.adaptation_text: {source} holds prepared rows, which cannot be mixed with"
                " other sources; prepare them together."
            )
    with naming("adaptation_text"):
        of_test = set() if task is None else task.test_texts
        of_probe = set() if bitext is None else bitext.texts
        texts = read_texts(*config.adaptation_text, unwanted=of_test | of_probe)
    notes = []
    if left_out := texts.dropped:
        whose = [name for name, of in (("test's", of_test), ("probe's", of_probe)) if of]
        notes.append(
            f"{left_out} of {len(texts) + left_out} texts are left out of stage 1: they are the"
            f" {' or the '.join(whose)}."
        )
    if len(texts.reads) > 1:
        adaptation = config.adaptation
        draws = draws_of(texts, adaptation.mixture, adaptation.samplings)
        told = (
            f"{read.name} {drawn / sum(draws):.1%} ({drawn} drawn of {read.texts})"
            for read, drawn in zip(texts.reads, draws, strict=True)
        )
        notes.append(f"Texts of stage 1: {', '.join(told)}.")
    return texts, " ".join(notes)


def _read_adaptation_text(
    config: MTLLM, source: SourceTokenizer | None, task: Task | None, bitext: Bitext | None
) -> tuple[Texts | Prepared, str]:
    """As `unseen_texts`; rows that were prepared are what they are."""
    folder = config.adaptation_text[0]
    if len(config.adaptation_text) > 1 or not is_prepared(folder):
        return unseen_texts(config, task, bitext)
    with naming("adaptation_text"):
        if source is None or not config.llm:
            raise ValueError(
                f"{folder} holds prepared rows, which take config.encoder and"
                " config.llm with the tokenizers that they were prepared with"
            )
        prepared = Prepared(folder)
        target = TargetTokenizer(local_files(config.llm))
        prepared.check(maker_of(config, source, target, seed=0).describe())
    return prepared, ""
