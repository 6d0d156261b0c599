"""tokenizer_config.json such that transformers 4.57 and 5 read the same tokenizer from it."""

from collections.abc import Mapping
from typing import Any

# A class that 5 alone knows, by the name that both do.
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json as both releases read it.

    5 writes a list `extra_special_tokens`, where 4.57 takes a dict alone; both take the list under
    its older name.
    """
    result = dict(config)
    if isinstance(tokens := result.get("extra_special_tokens"), list):
        del result["extra_special_tokens"]
        if tokens:
            result.setdefault("additional_special_tokens", tokens)
    if (name := result.get("tokenizer_class")) in _CLASSES:
        result["tokenizer_class"] = _CLASSES[name]
    return result
