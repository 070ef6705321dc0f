"""Tiny random models, as transformers saves and runs them and as engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from trtllm_core.plugin import Plugins
from trtllm_core.testing.reference import ReferenceModel, reference_models

GPT = {"vocab_size": 67, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 96, "dtype": "float32"}
NEOX = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "dtype": "float32",
}


def config(kind: str, **changes: Any) -> Any:
    if kind == "gpt2":
        return transformers.GPT2Config(**{**GPT, **changes})
    if kind == "gptj":
        return transformers.GPTJConfig(**{**GPT, "rotary_dim": 8, **changes})
    return transformers.GPTNeoXConfig(**{**NEOX, **changes})


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Callable[..., ReferenceModel]:
    """``tiny(kind, gain, **changes of its config)``, made once each."""
    return reference_models(config, tmp_path_factory.mktemp, plugins)
