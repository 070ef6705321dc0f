"""The conformance kit on the members whose weights or layers are not LLaMA's own."""

from __future__ import annotations

import transformers

from trtllm_core.testing import ModelFamilyConformance

SIZES = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


class TestQwen3(ModelFamilyConformance):
    config = transformers.Qwen3Config(**SIZES, head_dim=24)


class TestPhi3(ModelFamilyConformance):
    config = transformers.Phi3Config(**SIZES, pad_token_id=0, sliding_window=21)
