"""What a run of SDRRL reads: opened and checked at the door, before anything is written."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtllm_jax import sharding
from mtllm_jax.config import SDRRL, naming, require
from mtllm_jax.data.babel import check_languages
from mtllm_jax.data.tokenise import TargetTokenizer, translation_tokenizer
from mtllm_jax.hf.encoder import TRANSLATORS
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.folder import read_config
from mtllm_jax.hf.llama import check_llama
from mtllm_jax.hf.locate import locate
from mtllm_jax.hf.nllb import check_nllb
from mtllm_jax.languages import ENGLISH, check_language
from mtllm_jax.models.llama import FAMILIES
from mtllm_jax.recipes.inputs import checked_mesh, idle_sentence, lora_targets
from mtllm_jax.recipes.own_text import read_own
from mtllm_jax.recipes.transferring import Material

# The fields that name models, and the model_types that each may be of.
_MODELS = {"llm": FAMILIES, "translator": TRANSLATORS}
# And those of the models that are trained in their place.
_MINI = {"llm": "mini_llama", "translator": "mini_nllb"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The devices, and the config with folders in the place of names on the Hugging Face hub.

    revisions: the commits that those names stood for, by field. own: what `config.own` names; None
    where the embedded instructions are taken.
    """

    config: SDRRL
    revisions: Mapping[str, str]
    mesh: jax.sharding.Mesh
    own: Material | None = None


def read_inputs(config: SDRRL, revisions: Mapping[str, str] = {}) -> Inputs:
    """Check all that the config names, the cheapest first. ValueError, naming the field.

    revisions: as of `inputs.read_inputs`. Reads no weights and, but for what is fetched from the
    hub, writes nothing.
    """
    _check_given(config)
    if config.own.prompts:
        _check_parts(config)
    else:
        allowed = f"{ENGLISH!r}, in which the embedded instructions are"
        require(config.english == ENGLISH, "transfer.source", config.english, allowed)
        with naming("transfer.targets"):
            check_languages(config.languages)
    mesh = checked_mesh(config)
    if "on_policy" in config.systems:
        sharding.check_length(config.on_policy.teacher_length, mesh, "on_policy.teacher_length")
    if config.trained == "lora":
        lora_targets(config)
    config, found = _located(config, revisions)
    if config.llm:
        _check_llm(config)
    elif config.answering.template == "chat":
        others = "'none', 'alpaca' or 'llama2' with the mini LLM, which has no chat template"
        require(False, "answering.template", "chat", others)
    if config.translator:
        _check_translator(config)
    return Inputs(config, found, mesh, read_own(config) if config.own.prompts else None)


def _located(config: SDRRL, revisions: Mapping[str, str]) -> tuple[SDRRL, dict[str, str]]:
    folders: dict[str, Any] = {}
    found: dict[str, str] = {}
    for weights in (False, True):  # no weights are fetched of what cannot be read
        for field, families in _MODELS.items():
            if name := getattr(config, field):
                with naming(field):
                    checkpoint = locate(name, revisions.get(field), weights=weights)
                    folders[field] = os.fspath(checkpoint.folder)
                    read_config(folders[field], families)
                    if checkpoint.revision is not None:
                        found[field] = checkpoint.revision
    return dataclasses.replace(config, **folders), found


def _check_given(config: SDRRL) -> None:
    """What cannot be made here is named: models beside instructions of the user's own, and all in
    settings for real models."""
    needed = {"llm": True, "translator": config.translates}
    for field, own in _MINI.items():
        if not needed[field] or getattr(config, field):
            continue
        told = "so it must name the Hugging Face folder of one."
        if getattr(config, own) is None:
            raise ValueError(
                f"config.{field} is ''; the settings {config.name} are for real models, {told}"
            )
        if config.own.prompts:
            raise ValueError(
                f"config.{field} is ''; the mini models know nothing of own.prompts, {told}"
            )
    if config.mini_llama is None and not config.own.prompts:
        raise ValueError(
            f"config.own.prompts is ''; the settings {config.name} are for real models, so it must"
            " name a file of instructions for them."
        )


def _check_parts(config: SDRRL) -> None:
    """What each kind of rows is made from is named."""
    for system, settings in config.sets.items():
        for kind, field, what in (
            ("translation", "parallel", "corpus"),
            ("completion", "parallel", "corpus"),
            ("switched", "lexicons", "folder"),
        ):
            weight, given = getattr(settings, kind), getattr(config.own, field)
            is_there, lacking = (
                bool(given) or not weight,
                f"where config.own.{field} names no {what}",
            )
            if getattr(config.transfer, kind):
                require(is_there, f"transfer.{kind}", weight, f"0 {lacking}")
            else:  # it is a baseline's
                require(is_there, "systems", config.systems, f"without {system} {lacking}")


def _check_llm(config: SDRRL) -> None:
    with naming("llm"):
        sizes = check_llama(config.llm)
        tokenizer = TargetTokenizer(local_files(config.llm))
        if tokenizer.vocab_size > sizes.vocab_size:
            raise ValueError(
                f"{config.llm}: its tokenizer has {tokenizer.vocab_size} tokens and its model"
                f" embeds {sizes.vocab_size}"
            )
    answering = config.answering
    if answering.template == "chat":
        others = "'none', 'alpaca' or 'llama2', as the LLM's tokenizer has no chat template"
        require(tokenizer.has_chat_template, "answering.template", "chat", others)
    room, new = sizes.max_positions, answering.max_new_tokens
    allowed = f"below {room}, the LLM's context, which prompt and answer share"
    require(new < room, "answering.max_new_tokens", new, allowed)
    how = config.on_policy
    lengths = {"training.target_length": (config.training, config.training.target_length)}
    if "on_policy" in config.systems:
        lengths["on_policy.training.target_length"] = how.training, how.training.target_length
        lengths["on_policy.teacher_length"] = how.training, how.teacher_length
    allowed = f"at most {room}, the LLM's context"
    for field, (training, length) in lengths.items():
        require(training.packing or length <= room, field, length, allowed)


def _check_translator(config: SDRRL) -> None:
    with naming("translator"):
        check_nllb(config.translator)
        tokenizer = translation_tokenizer(local_files(config.translator))
    for field, codes in (("source", (config.english,)), ("targets", config.languages)):
        with naming(f"transfer.{field}"):
            for code in codes:
                check_language(code, tokenizer.languages)


def idle_fields(config: SDRRL, given: Sequence[str]) -> str:
    """One line naming those of the `given` fields (dotted) that have no effect, and why; or ""."""
    reasons = dict.fromkeys(
        ("training.source_length", "on_policy.training.source_length"),
        "this stage reads no source side",
    )
    for field, own in _MINI.items():
        if getattr(config, field):
            reasons[own] = f"config.{field} names the model"
    if not config.translates:
        told = "nothing is translated in these settings"
        reasons |= dict.fromkeys(("mini_nllb", "translator", "translating"), told)
    if config.own.tests:
        reasons["own.held_out_pairs"] = "config.own.tests is what the systems are compared by"
    elif not config.own.parallel:
        reasons["own.held_out_pairs"] = "config.own.parallel is empty"
    if config.own.prompts and not config.own.tests:
        reasons["test_instructions"] = "config.own.tests is empty"
    if not any(made.answers == "rewritten" for made in config.sets.values()):
        reasons["transfer.rewriting_prompt"] = "config.systems has none that learns such answers"
    if "on_policy" not in config.systems:
        reasons["on_policy"] = "config.systems does not have it"
    if config.trained == "all":
        reasons["lora"] = "config.trained is 'all'"
    reasons |= _idle_of_sets(config)
    if config.answering.temperature == 0:
        reasons |= dict.fromkeys(("answering.top_k", "answering.top_p"), "answers are not drawn")
    reasons["transfer.least_similarity"] = "config.transfer.answer_filter is not 'similarity'"
    return idle_sentence(reasons, given)


def _idle_of_sets(config: SDRRL) -> dict[str, str]:
    """The fields that are about rows which no system has, no baseline either."""
    made = config.sets.values()
    kinds = ("switched", "translation", "completion")
    switched, translation, completion = (any(getattr(one, kind) for one in made) for kind in kinds)
    crossed = switched and {"LT", "TL"} & {*config.transfer.switched_from}
    is_read = {
        **dict.fromkeys(("switched_from", "switched_sides", "switch_rate"), switched),
        "crossed_prompt": crossed or any(one.lt or one.tl for one in made),
        "parallel_pairs": translation or completion,
        "translation_prompt": translation,
        "completion_prompt": completion,
        "prefix": completion,
    }
    told = "config.systems has none with such rows"
    return {f"transfer.{name}": told for name, is_used in is_read.items() if not is_used}
