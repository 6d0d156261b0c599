"""mtllm_jax: machine-translation encoders under English-centric LLMs, joined by self-distillation.

`load(folder)` opens a finished run for use. It alone is public here: importing the package must
stay cheap, and must not start JAX before a script has chosen its devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtllm_jax.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from mtllm_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
