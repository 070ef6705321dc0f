"""Rotary frequencies against transformers', and the rotation against complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trtllm_core.nn import RotaryEmbedding, rotate_
from trtllm_core.nn.rotary import RotaryScaling, inverse_frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"original_max_position_embeddings": 512}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 2.5}),
    ("llama3", {"factor": 8.0, **LLAMA3}),
    ("llama3", {"factor": 32.0, **LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 9.0}),
    ("yarn", {"factor": 4.0, **YARN}),
    ("yarn", {"factor": 1.0, **YARN}),
    ("yarn", {"factor": 16.0, **YARN, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False}),
    ("yarn", {"factor": 40.0, **YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    ("yarn", {"factor": 4.0, **YARN, "attention_factor": 0.8}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 4}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES)
@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("base", [500.0, 10000.0, 500000.0])
def test_frequencies(kind: str, fields: dict[str, Any], dim: int, base: float) -> None:
    rope = {"rope_type": kind, "rope_theta": base, **fields}
    config = transformers.LlamaConfig(head_dim=dim, max_position_embeddings=2048, rope_parameters=rope)
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    ours, ours_factor = inverse_frequencies(dim, base, RotaryScaling(kind=kind, **fields), 2048, 1)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert ours_factor == pytest.approx(factor)


@pytest.mark.parametrize("length", [1, 100, 101, 150, 400])
def test_dynamic(length: int) -> None:
    """Each token has the base of a sequence that ends with it."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = transformers.LlamaConfig(head_dim=32, max_position_embeddings=100, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=length)
    ours, factor = inverse_frequencies(32, 10000.0, RotaryScaling(kind="dynamic", factor=4.0), 100, 400)
    torch.testing.assert_close(ours[length - 1], theirs, rtol=2e-6, atol=0)
    assert (ours.shape, factor) == ((400, 16), 1.0)


def test_factors_and_none() -> None:
    plain, _ = inverse_frequencies(8, 100.0, RotaryScaling(), 64, 1)
    torch.testing.assert_close(plain, 100.0 ** -torch.tensor([0, 0.25, 0.5, 0.75]))
    scaling = RotaryScaling(kind="factors", factors=(1.0, 2.0, 4.0, 8.0))
    torch.testing.assert_close(inverse_frequencies(8, 100.0, scaling, 64, 1)[0], plain / torch.tensor([1.0, 2, 4, 8]))


def test_rotation_is_a_complex_product() -> None:
    rotary = RotaryEmbedding(16, 10000.0, 64)
    rotary.prepare(64, torch.device("cpu"), torch.float32)
    positions = torch.tensor([0, 1, 5, 63])
    x = torch.randn(4, 3, 16)
    angles = positions[:, None].double() * 10000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * torch.exp(1j * angles)[:, None]
    out = rotate_(x.clone(), 2, *rotary(positions))
    assert torch.equal(out[:, 2], x[:, 2]), "the values stay"
    out, x, turned = out[:, :2], x[:, :2], turned[:, :2]
    torch.testing.assert_close(out.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-4, atol=1e-5)
    assert torch.equal(out[0], x[0])
