"""What configs of the family may say, each against transformers: prefill and decoding over a ragged batch."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_core.testing.packed import prefill_and_decode
from trtllm_core.testing.reference import STEPS
from trtllm_plugin_gpt import layouts

THETA = {"rope_theta": 10000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2 by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 inner": ("gpt2", {"n_inner": 88, "activation_function": "quick_gelu"}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 head of 128": ("gpt2", {"n_embd": 256, "n_head": 2}),
    "gptj": ("gptj", {}),
    "gptj whole": ("gptj", {"rotary_dim": 16}),
    "gptj inner": ("gptj", {"n_inner": 88, "activation_function": "gelu"}),
    "gptj head of 256": ("gptj", {"n_embd": 512, "n_head": 2, "rotary_dim": 64}),
    "neox": ("neox", {}),
    "neox serial": ("neox", {"use_parallel_residual": False}),
    "neox whole": ("neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0, **THETA}}),
    "neox theta": ("neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5,
                                                "rope_theta": 500.0}}),
    "neox linear": ("neox", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5,
                                                 **THETA}}),
    "neox unbiased": ("neox", {"attention_bias": False}),
    "neox tied": ("neox", {"tie_word_embeddings": True}),
    "neox gelu_fast": ("neox", {"hidden_act": "gelu_fast"}),
    "neox head of 96": ("neox", {"hidden_size": 192, "num_attention_heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, tiny: Any) -> None:
    kind, changes = CASES[case]
    model = tiny(kind, **changes)
    assert model.off(prefill_and_decode(model.session(), model.prompts, STEPS, shuffle=3)) < 1e-4


MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scale": ("gpt2", {"scaled_scores": False}),
    "scale of a layer": ("gpt2", {"scaled_by_layer": True}),
    "no rotation": ("gptj", {"rotary_dim": 0}),
    "part of the rotation": ("gptj whole", {"rotary_dim": 8}),
    "theta": ("neox", {"rope_theta": 500.0}),
    "scaling": ("neox linear", {"rope_scaling": {}}),
    "residual": ("neox", {"residual": "serial"}),
    "other residual": ("neox serial", {"residual": "parallel"}),
    "activation": ("neox", {"activation": "quick_gelu"}),
    "norm": ("gpt2", {"norm_eps": 1e-2}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_shows(mutant: str, tiny: Any) -> None:
    """The comparison can fail: every number that it is meant to prove moves it far beyond its tolerance."""
    case, extras = MUTANTS[mutant]
    kind, changes = CASES[case]
    model = tiny(kind, **changes)
    assert model.off(prefill_and_decode(model.mutant(extras), model.prompts, STEPS)) > 1e-3


@pytest.mark.parametrize(("kind", "name"), [("gptj", "halves"), ("neox", "of_each_head"), ("gpt2", "rows")])
def test_a_wrong_order_of_rows_shows(kind: str, name: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours taken for halves; heads taken for thirds; thirds taken for heads."""
    wrong: Any = {
        "halves": lambda size, dim: lambda tensor: tensor,
        "of_each_head": lambda part, parts, size: lambda tensor: tensor.chunk(parts)[part],
        "rows": lambda first, count: layouts.of_each_head(first // count, 3, 16),
    }[name]
    monkeypatch.setattr(layouts, name, wrong)
    model = tiny(kind, vocab_size=71)  # built here, not before
    assert model.off(prefill_and_decode(model.session(), model.prompts, STEPS)) > 1e-2
