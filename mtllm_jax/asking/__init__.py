"""An LLM's folder asked published benchmarks by prompts: what is asked, answered and measured."""
