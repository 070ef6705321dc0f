"""Tiny random models, as transformers saves and runs them and as engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from trtllm_core.plugin import Plugins
from trtllm_core.testing.reference import ReferenceModel, reference_models

SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "phi3": transformers.Phi3Config,
}
OF_KIND: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 24},
    "phi3": {"original_max_position_embeddings": 96, "pad_token_id": 0},
}


def config(kind: str, **changes: Any) -> Any:
    return CONFIGS[kind](**{**SMALL, **OF_KIND.get(kind, {}), **changes})


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Callable[..., ReferenceModel]:
    """``tiny(kind, gain, **changes of its config)``, made once each."""
    return reference_models(config, tmp_path_factory.mktemp, plugins, "llama")
