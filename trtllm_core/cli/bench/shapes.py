"""Published shapes by name: the configs of well-known models, to measure with random weights of their sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_core.checkpoint import Checkpoint
from trtllm_core.errors import ConfigError, listing

if TYPE_CHECKING:
    import torch


def _llama(
    vocab_size: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    positions: int,
    theta: float,
    architecture: str = "LlamaForCausalLM",
    model_type: str = "llama",
    **more: Any,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **more,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def _rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_QWEN2: dict[str, Any] = {"architecture": "Qwen2ForCausalLM", "model_type": "qwen2", "rms_norm_eps": 1e-6}
_QWEN3: dict[str, Any] = {
    "architecture": "Qwen3ForCausalLM",
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "head_dim": 128,
}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 4096, 1e4, torch_dtype="float16"),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8, 131072, 5e5, rope_scaling=_rope(8.0)),
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, 131072, 5e5, rope_scaling=_rope(32.0), head_dim=64, **_TIED),
    "llama-3.2-3b": _llama(128256, 3072, 8192, 28, 24, 8, 131072, 5e5, rope_scaling=_rope(32.0), head_dim=128, **_TIED),
    "tinyllama-1.1b": _llama(32000, 2048, 5632, 22, 32, 4, 2048, 1e4),
    "mistral-7b-v0.3": _llama(32768, 4096, 14336, 32, 32, 8, 32768, 1e6, "MistralForCausalLM", "mistral"),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 8192, 1e5, **_TIED),
    "smollm2-360m": _llama(49152, 960, 2560, 32, 15, 5, 8192, 1e5, **_TIED),
    "smollm2-1.7b": _llama(49152, 2048, 8192, 24, 32, 32, 8192, 1.3e5, **_TIED),
    "qwen2.5-0.5b": _llama(151936, 896, 4864, 24, 14, 2, 32768, 1e6, **_QWEN2, **_TIED),
    "qwen3-0.6b": _llama(151936, 1024, 3072, 28, 16, 8, 40960, 1e6, **_QWEN3, **_TIED),
    "qwen3-8b": _llama(151936, 4096, 12288, 36, 32, 8, 40960, 1e6, **_QWEN3),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt-j-6b": {
        **_gpt2(4096, 28, 16),
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "vocab_size": 50400,
        "n_positions": 2048,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
    },
    "pythia-160m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "bloom-560m": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": 250880,
        "hidden_size": 1024,
        "n_layer": 24,
        "n_head": 16,
        "torch_dtype": "float16",
    },
}
"""Fields of ``config.json``, as the models were published on Hugging Face."""


class ShapeCheckpoint(Checkpoint):
    """A published config without weights: enough for a family to say what its module looks like."""

    format = "hf"

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        super().__init__(Path(name))
        self._config = config

    @property
    def architecture(self) -> str:
        """See ``Checkpoint``."""
        return str(self._config["architectures"][0])

    @property
    def config(self) -> Mapping[str, Any]:
        """See ``Checkpoint``."""
        return self._config

    @property
    def nbytes(self) -> int:
        """See ``Checkpoint``: none."""
        return 0

    def digest(self) -> str:
        """See ``Checkpoint``: of the config, which is all there is."""
        return hashlib.sha256(json.dumps(self._config, sort_keys=True).encode()).hexdigest()

    def names(self) -> frozenset[str]:
        """See ``Checkpoint``: none, so that a config's own word on a tied head counts."""
        return frozenset()

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Checkpoint``."""
        raise self._unknown(name)

    def stored(self, name: str) -> str:
        """See ``Checkpoint``."""
        raise self._unknown(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See ``Checkpoint``."""
        raise self._unknown(name)

    def tokenizer(self) -> None:
        """See ``Checkpoint``: none."""


def find_shape(name: str) -> ShapeCheckpoint:
    """A published shape.

    Raises:
        ConfigError: none has this name; the message lists those that there are.
    """
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r} (known: {listing(SHAPES)})")
    return ShapeCheckpoint(name, SHAPES[name])
