"""The conformance kit."""

from __future__ import annotations

import transformers

from trtllm_core.testing import ModelFamilyConformance

SIZES = {"vocab_size": 67, "hidden_size": 64, "n_layer": 2, "seq_length": 96}


class TestBloom(ModelFamilyConformance):
    config = transformers.BloomConfig(**SIZES, n_head=4)


class TestBloomOfSixHeads(ModelFamilyConformance):
    """Six is no power of two, and the second rank's slopes are of both kinds."""

    config = transformers.BloomConfig(**{**SIZES, "hidden_size": 96}, n_head=6)
