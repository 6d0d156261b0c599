"""What stands around a prompt where an LLM is asked, in use as in training.

    chat     the chat template of the LLM's own folder
    alpaca   that of Stanford Alpaca, for instructions without an input
    llama2   that of Llama 2's chat models
    none     nothing

A tokenizer that begins texts with a BOS does so here too, but under `chat`, where all is said.
"""

import sys
from collections.abc import Sequence

import numpy as np

from mtllm_jax.data.tokenise import Ids, TargetTokenizer

NAMES = ("chat", "alpaca", "llama2", "none")

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
_LLAMA2 = "[INST] {prompt} [/INST]"
_LLAMA2_SYSTEM = "<<SYS>>\n{system}\n<</SYS>>\n\n{prompt}"


class Template:
    """Prompts as token ids, up to where the answer begins. name: one of `NAMES`.

    system: what the LLM is told before all prompts; "" = nothing, or what its chat template says.
    ValueError for an unknown name, a tokenizer without a chat template, and a system prompt where
    the template has no place for one.
    """

    def __init__(self, name: str, tokenizer: TargetTokenizer, system: str = ""):
        if name not in NAMES:
            raise ValueError(f"--template is {name!r}; it may be one of {', '.join(NAMES)}.")
        if name == "chat" and not tokenizer.has_chat_template:
            raise ValueError(
                "--template is 'chat', but the tokenizer has no chat template; others are"
                f" {', '.join(NAMES[1:])}."
            )
        if system and name in ("alpaca", "none"):
            raise ValueError(
                f"--system is {system!r}, for which template {name!r} has no place; 'chat' and"
                " 'llama2' have one."
            )
        self._name, self._tokenizer, self._system = name, tokenizer, system

    def __call__(self, prompts: list[str]) -> Ids:
        """The ids of each prompt, int32. ValueError where the chat template refuses one."""
        if self._name == "chat":
            told = [{"role": "system", "content": self._system}] if self._system else []
            return self._tokenizer.encode_chats(
                [[*told, {"role": "user", "content": prompt}] for prompt in prompts]
            )
        return self._tokenizer.encode([self._text(prompt) for prompt in prompts])

    def followed(self, prompt: str, answers: Sequence[str]) -> tuple[np.ndarray, Ids]:
        """The ids of a prompt, and of each answer behind it as training has answers: a text of its
        own without a BOS. Under `none` the prompt is gone on with after a space, as one text:
        tokens of its end that differ with the answer are the answer's. ValueError as for prompts.
        """
        if self._name == "none":
            replaced, following = self._tokenizer.encode_continuations(prompt, answers)
            (ids,) = self._tokenizer.encode_prompts([("", prompt)], max_length=sys.maxsize)
            return ids[: len(ids) - replaced], following
        bos = self._tokenizer.bos_id
        said = self._tokenizer.encode(answers)
        begins = [len(ids) > 0 and ids[0] == bos for ids in said]
        return self([prompt])[0], [
            ids[int(begin) :] for ids, begin in zip(said, begins, strict=True)
        ]

    def _text(self, prompt: str) -> str:
        match self._name:
            case "alpaca":
                return _ALPACA.format(prompt=prompt)
            case "llama2" if self._system:
                inner = _LLAMA2_SYSTEM.format(system=self._system, prompt=prompt)
                return _LLAMA2.format(prompt=inner)
            case "llama2":
                return _LLAMA2.format(prompt=prompt)
            case _:
                return prompt
