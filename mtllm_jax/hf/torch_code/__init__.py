"""What an exported stack is loaded with: PyTorch and transformers alone, copied into each folder.

There multiple_choice.py of mtllm_jax/tasks lies beside these files, which import it.
"""
