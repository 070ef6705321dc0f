"""Logits against transformers: prefill and decoding, over ragged batches with shuffled block tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from trtllm_core import nn
from trtllm_core.testing.packed import PackedRows, prefill_and_decode
from trtllm_core.testing.reference import STEPS, oracle

THETA = {"rope_theta": 10000.0}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 3.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        **THETA,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, **THETA},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
        **THETA,
    },
    "yarn-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 24,
        **THETA,
    },
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.2, 2.5, 3.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
    **THETA,
}
BIASED = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", BIASED),
    "head_dim": ("llama", {"head_dim": 24}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    **{f"rope-{kind}": ("llama", {"rope_parameters": rope}) for kind, rope in SCALED.items()},
    "mistral": ("mistral", {"sliding_window": 10}),
    "mistral-whole": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 10, "num_key_value_heads": 4}),
    "phi3-partial": ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, **THETA, "rope_type": "default"}}),
    "phi3-short": ("phi3", {"rope_parameters": LONGROPE}),
    "phi3-long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}),
}


@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, tiny: Any) -> None:
    kind, changes = CASES[case]
    model = tiny(kind, **changes)
    ours = prefill_and_decode(model.session(), model.prompts, STEPS, shuffle=3)
    assert model.off(ours) < 1e-4


MUTANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"rope-{kind}": (f"rope-{kind}", {"rope_scaling": {}}, {}) for kind in SCALED if kind != "dynamic"},
    "attention factor": ("rope-yarn-factor", {"rope_scaling": SCALED["yarn"]}, {}),
    "theta": ("theta", {"rope_theta": 600.0}, {}),
    "norm": ("gqa", {"norm_eps": 1e-3}, {}),
    "activation": ("gqa", {"activation": "gelu"}, {}),
    "window + 1": ("mistral", {}, {"sliding_window": 11}),
    "window - 1": ("mistral", {}, {"sliding_window": 9}),
    "layers of the window": ("qwen2-window", {"windowed_layers": [0, 1, 2]}, {}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_shows(mutant: str, tiny: Any) -> None:
    """The comparison can fail: every number that it is meant to prove moves it far beyond its tolerance."""
    case, extras, config = MUTANTS[mutant]
    kind, changes = CASES[case]
    model = tiny(kind, **changes)
    if extras.get("rope_scaling"):
        known = nn.rotary.RotaryScaling.model_fields
        extras = {"rope_scaling": {"kind": "yarn", **{k: v for k, v in SCALED["yarn"].items() if k in known}}}
    ours = prefill_and_decode(model.mutant(extras, **config), model.prompts, STEPS)
    assert model.off(ours) > 1e-3


def test_swapped_halves_show(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = nn.RotaryEmbedding.prepare

    def swapped(self: nn.RotaryEmbedding, *args: Any) -> None:
        prepare(self, *args)
        assert self.table is not None
        self.table[:, self.dim :] *= -1

    monkeypatch.setattr(nn.RotaryEmbedding, "prepare", swapped)
    model = tiny()
    assert model.off(prefill_and_decode(model.session(), model.prompts, STEPS)) > 1e-2


@pytest.mark.parametrize("case", ["gqa", "mistral", "qwen2-window", "rope-dynamic"])
def test_chunks_and_verification(case: str, tiny: Any) -> None:
    """Rows that run 1, a few or many tokens after any past, in one call, answer as whole prompts do."""
    kind, changes = CASES[case]
    model = tiny(kind, **changes)
    rows = PackedRows(model.session(), len(model.prompts), shuffle=5)
    parts: list[list[torch.Tensor]] = [[] for _ in model.prompts]
    sizes = ([7, 1, 3], [1, 1, 6], [16, 5, 1], [1, 9, 2])
    for turn in range(72):
        chunks = {
            row: ids[(at := int(rows.lengths[row])) : at + sizes[row][turn % 3]]
            for row, ids in enumerate(model.prompts)
            if (row + turn) % 4 and rows.lengths[row] < len(ids)  # each row sits out every fourth call
        }
        for row, logits in rows.run(dict(reversed(chunks.items()))).items() if chunks else ():
            parts[row].append(logits)
    assert rows.lengths.tolist() == [len(ids) for ids in model.prompts]
    ours = [torch.cat(part) for part in parts]
    assert model.off(ours) < 1e-4
    whole = PackedRows(model.session(), len(model.prompts), shuffle=None).run(dict(enumerate(model.prompts)))
    assert model.off(ours, list(whole.values())) < 1e-5


def test_rewound_drafts(tiny: Any) -> None:
    """Verification writes drafts behind the past; rejected ones are overwritten and leave no trace."""
    model = tiny()
    ids, wrong = model.prompts[2], [(token + 1) % 67 for token in model.prompts[2]]
    rows = PackedRows(model.session(), 1)
    parts = [rows.run({0: ids[:20]})[0]]
    for at in range(20, 44, 4):
        verified = rows.run({0: ids[at : at + 4] + wrong[at + 4 : at + 9]})[0]
        rows.lengths[0] -= 5
        parts.append(verified[:4])
    assert model.off([torch.cat(parts)], [model.expected[2][:44]]) < 1e-4


@torch.inference_mode()
def step_by_step(model: Any, ids: list[int], prompt: int) -> torch.Tensor:
    cache = transformers.DynamicCache(config=model.config)
    calls = [ids[:prompt], *([token] for token in ids[prompt:])]
    return torch.cat([model(torch.tensor([call]), past_key_values=cache).logits[0] for call in calls])


def test_dynamic_scaling_beyond_the_trained_length(tiny: Any) -> None:
    """Equal to transformers as it generates: there too, each new token has the base of the length that it ends."""
    model = tiny("llama", max_position_embeddings=24, rope_parameters={**SCALED["dynamic"], "factor": 4.0})
    prompts = [ids[: 24 + STEPS] for ids in model.prompts]
    # Prompts below 24: transformers forgets the base of the sequence before only when one begins shorter than that.
    expected = [step_by_step(model.model, ids, min(23, len(ids) - 1)) for ids in prompts]
    ours = prefill_and_decode(model.session(), prompts, STEPS)
    assert max(map(len, prompts)) == 56
    assert model.off(ours, expected) < 1e-4
    # A whole pass of transformers has one base for all tokens.
    assert model.off(ours, oracle(model.model, prompts)) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["gqa", "mistral", "qwen2"])
def test_half_precision(case: str, dtype: str, tiny: Any) -> None:
    """Against float32 arithmetic on the same rounded weights, and about as near to it as transformers comes."""
    kind, changes = CASES[case]
    model = tiny(kind, gain=0.8, **changes)  # larger weights magnify each rounding, in transformers as here
    half = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, dtype))
    theirs = oracle(half, model.prompts)
    exact = model.rounded(dtype)
    ours = prefill_and_decode(model.session(dtype), model.prompts, STEPS)
    assert 0 < model.off(ours, exact) < 2e-2
    assert model.off(ours, exact) < 2 * model.off(theirs, exact)


def test_one_pass_over_chosen_positions(tiny: Any) -> None:
    """``logits_indices`` chooses positions in any order, also as many as there are tokens."""
    model = tiny()
    rows = PackedRows(model.session(), 2)
    inputs = rows.inputs({0: model.prompts[0][:6], 1: model.prompts[2][:5]})
    everything = [*model.expected[0][:6], *model.expected[2][:5]]
    for asked in ([10, 5], list(reversed(range(11))), [3] * 11, [0]):
        logits = torch.empty(len(asked), 67)
        rows.session.run({**inputs, "logits_indices": torch.tensor(asked)}, {"logits": logits})
        assert model.off([logits], [torch.stack([everything[i] for i in asked])]) < 1e-4
    rows.session.run({**inputs, "logits_indices": torch.zeros(0, dtype=torch.int64)}, {"logits": torch.empty(0, 67)})


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["gqa", "mistral", "qwen2-window", "rope-llama3", "biased"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2), ("float16", 2e-2)])
def test_cuda(case: str, dtype: str, tolerance: float, tiny: Any) -> None:
    kind, changes = CASES[case]
    model = tiny(kind, gain=0.8, **changes)
    theirs = model.rounded(dtype)
    session = model.session(dtype, device="cuda")
    assert model.off(prefill_and_decode(session, model.prompts, STEPS), theirs) < tolerance
    rows = PackedRows(session, len(model.prompts), shuffle=2)
    chunks = [rows.run({row: ids[at : at + 6] for row, ids in enumerate(model.prompts) if at < len(ids)})
              for at in range(0, 72, 6)]  # fmt: skip
    ours = [torch.cat([chunk[row] for chunk in chunks if row in chunk]) for row in range(len(model.prompts))]
    assert model.off(ours, theirs) < tolerance
