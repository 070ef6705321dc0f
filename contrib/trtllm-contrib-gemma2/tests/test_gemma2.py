"""The family through the kit."""

from __future__ import annotations

import transformers

from trtllm_core.testing import ModelFamilyConformance

SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 96,
    "query_pre_attn_scalar": 24,
    "sliding_window": 10,
}


class TestGemma2(ModelFamilyConformance):
    config = transformers.Gemma2Config(**SMALL, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)


class TestWithoutCaps(ModelFamilyConformance):
    config = transformers.Gemma2Config(**SMALL, attn_logit_softcapping=None, final_logit_softcapping=None)
