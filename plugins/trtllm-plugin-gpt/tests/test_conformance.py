"""The conformance kit."""

from __future__ import annotations

import transformers

from trtllm_core.testing import ModelFamilyConformance

GPT = {"vocab_size": 67, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}
NEOX = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}


class TestGPT2(ModelFamilyConformance):
    config = transformers.GPT2Config(**GPT)


class TestGPTJ(ModelFamilyConformance):
    config = transformers.GPTJConfig(**GPT, rotary_dim=8)


class TestGPTNeoX(ModelFamilyConformance):
    config = transformers.GPTNeoXConfig(**NEOX)
