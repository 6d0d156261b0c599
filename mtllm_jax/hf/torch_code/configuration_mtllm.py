"""Configuration of a stack: MT encoder, bridge, LLM, head."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig


class MTLLMConfig(PretrainedConfig):
    """Sizes of the two models, and how the stack reads.

    encoder_config, llm_config: configurations of the models, or their dicts.
    bridge_hidden: width between two linear maps with GELU; 0: there is one map. bridge_stride: so
    many positions of the encoder become one of the LLM.
    bidirectional: every position of the LLM sees the whole text, not only what stands before it.
    max_source_length: tokens of the longest text; the end of a longer one is cut off.
    languages: codes that a text may be in. language_ids: the token for each of them, which a text
    begins with, or ends with if language_at_end; None where the encoder is told no language.
    head: "none", "classification" or "multiple_choice".
    lora: adapters of the LLM's linear maps, {name: {"r": rank, "alpha": …}}; None where there are
    none, or merged ones.
    """

    model_type = "mtllm"
    sub_configs = {"encoder_config": AutoConfig, "llm_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        encoder_config: Any = None,
        llm_config: Any = None,
        bridge_hidden: int = 0,
        bridge_stride: int = 1,
        bidirectional: bool = True,
        max_source_length: int = 512,
        languages: Sequence[str] = (),
        language_ids: Sequence[int] | None = None,
        language_at_end: bool = False,
        head: str = "none",
        lora: dict[str, dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        self.encoder_config = _made(encoder_config)
        self.llm_config = _made(llm_config)
        self.bridge_hidden = bridge_hidden
        self.bridge_stride = bridge_stride
        self.bidirectional = bidirectional
        self.max_source_length = max_source_length
        self.languages = list(languages)
        self.language_ids = None if language_ids is None else list(language_ids)
        self.language_at_end = language_at_end
        self.head = head
        self.lora = lora
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the vectors that a text is turned into."""
        return self.llm_config.hidden_size


def _made(config: Any) -> Any:
    return AutoConfig.for_model(**config) if isinstance(config, dict) else config
