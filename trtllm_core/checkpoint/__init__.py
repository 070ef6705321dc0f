"""Reading checkpoints as others publish them: Hugging Face directories with safetensors, and GGUF files."""

from __future__ import annotations

from trtllm_core.checkpoint.base import Checkpoint
from trtllm_core.checkpoint.opening import open_checkpoint
from trtllm_core.checkpoint.tokenizer import SpecialTokens, Tokenizer, TokenizerError, TokenizerFiles

__all__ = ["Checkpoint", "SpecialTokens", "Tokenizer", "TokenizerError", "TokenizerFiles", "open_checkpoint"]
