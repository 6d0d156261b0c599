"""Configuration of a stack: MT encoder, linear bridge, LLM, head."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class MTLLMConfig(PretrainedConfig):
    """Sizes of the two models, and how the stack reads.

    encoder_config, llm_config: configurations of the models, or their dicts.
    bidirectional: every position of the LLM sees the whole text, not only what stands before it.
    max_source_length: tokens of the longest text; the end of a longer one is cut off.
    languages: codes that a text begins with, in the encoder's vocabulary; empty where it has none.
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
        bidirectional: bool = True,
        max_source_length: int = 512,
        languages: tuple[str, ...] = (),
        head: str = "none",
        lora: dict[str, dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        self.encoder_config = _made(encoder_config)
        self.llm_config = _made(llm_config)
        self.bidirectional = bidirectional
        self.max_source_length = max_source_length
        self.languages = list(languages)
        self.head = head
        self.lora = lora
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the vectors that a text is turned into."""
        return self.llm_config.hidden_size


def _made(config: Any) -> Any:
    return AutoConfig.for_model(**config) if isinstance(config, dict) else config
