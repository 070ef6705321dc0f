"""Layers: their formulas, and that the shares of all ranks make up the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from trtllm_core.nn import (
    MLP,
    ColumnLinear,
    GatedMLP,
    LayerNorm,
    Linear,
    LMHead,
    PositionEmbedding,
    QKVLinear,
    RMSNorm,
    RowLinear,
    VocabParallelEmbedding,
)
from trtllm_core.nn.mlp import ACTIVATIONS
from trtllm_core.parallel import TensorParallel

ONE = TensorParallel()


def filled(module: Any, seed: int = 0) -> Any:
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    return module


def test_norms() -> None:
    x = 3 + torch.randn(5, 24)
    rms, layer, bare = filled(RMSNorm(24, 1e-2)), filled(LayerNorm(24, 1e-2)), filled(LayerNorm(24, 1e-2, bias=False))
    torch.testing.assert_close(rms(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * rms.weight)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-2).sqrt()
    torch.testing.assert_close(layer(x), normal * layer.weight + layer.bias)
    torch.testing.assert_close(bare(x), normal * bare.weight)


def test_norms_of_half_precision_are_computed_in_float32() -> None:
    x = (300 * torch.randn(5, 24)).half()  # its squares are beyond float16
    norm = filled(RMSNorm(24, 1e-5))
    exact = norm(x.float())
    torch.testing.assert_close(norm.half()(x).float(), exact, rtol=5e-3, atol=5e-3)
    assert norm(x).dtype == torch.float16


@pytest.mark.parametrize("bias", [False, True])
def test_kernels_can_be_put_in_place(bias: bool) -> None:
    layer, x = filled(Linear(6, 4, bias)), torch.randn(3, 6)
    expected = x @ layer.weight.T + (layer.bias if layer.bias is not None else 0)
    torch.testing.assert_close(layer(x), expected)
    layer.matmul = lambda x, weight, bias: x @ weight.T + 1
    torch.testing.assert_close(layer(x), x @ layer.weight.T + 1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_the_name(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)


def test_mlp() -> None:
    mlp, x = filled(MLP(8, 12, "relu", ONE, bias=True)), torch.randn(3, 8)
    up = (x @ mlp.up.weight.T + mlp.up.bias).relu()
    torch.testing.assert_close(mlp(x), up @ mlp.down.weight.T + mlp.down.bias)
    half = MLP(8, 12, "relu", TensorParallel(1, 2), bias=True)
    assert [tuple(parameter.shape) for parameter in half.parameters()] == [(6, 8), (6,), (8, 6), (8,)]


def test_learned_positions() -> None:
    layer = filled(PositionEmbedding(10, 4))
    positions = torch.tensor([[0, 9], [3, 3]])
    assert torch.equal(layer(positions), layer.weight[positions])


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "gelu_new"])
def test_gated_mlp(activation: str) -> None:
    mlp, x = filled(GatedMLP(8, 12, activation, ONE, bias=True)), torch.randn(3, 8)
    gate, up = (x @ mlp.gate_up.weight.T + mlp.gate_up.bias).split(12, -1)
    reference = {"silu": nn.SiLU(), "gelu": nn.GELU(), "relu": nn.ReLU()}.get(activation, nn.GELU("tanh"))
    torch.testing.assert_close(mlp(x), (reference(gate) * up) @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "out"), [(8, 4, 2, 4 + 4), (8, 2, 2, 4 + 2), (8, 1, 4, 2 + 2), (8, 8, 1, 24)]
)
def test_head_shares(heads: int, kv_heads: int, size: int, out: int) -> None:
    for rank in range(size):
        layer = QKVLinear(32, heads, kv_heads, 4, TensorParallel(rank, size), bias=True)
        assert layer.weight.shape == (out * 4, 32)
        assert (layer.num_heads + 2 * layer.num_kv_heads) * 4 == layer.weight.shape[0]


def test_shapes_of_shares() -> None:
    half = TensorParallel(1, 2)
    assert ColumnLinear(6, 10, half).weight.shape == (5, 6)
    assert RowLinear(6, 10, half).weight.shape == (10, 3)
    assert LMHead(67, 6, half).weight.shape == VocabParallelEmbedding(67, 6, half).weight.shape == (34, 6)


class Loopback(TensorParallel):
    """A rank that keeps what it would have sent."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return x


def test_shares_add_up() -> None:
    table = torch.randn(68, 6)
    ids = torch.tensor([0, 33, 34, 66], dtype=torch.int32)
    parts, logits, x = [], [], torch.randn(2, 6)
    for rank in range(2):
        layer = VocabParallelEmbedding(67, 6, Loopback(rank, 2))
        layer.weight.data = table[34 * rank : 34 * rank + 34]
        parts.append(layer(ids))
        logits.append(layer.logits(x))
    assert torch.equal(sum(parts), table[ids.long()])  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(logits, -1), x @ table.T)

    weight, bias, y = torch.randn(5, 6), torch.randn(5), torch.randn(2, 6)
    total = torch.zeros(2, 5)
    for rank in range(2):
        row = RowLinear(6, 5, Loopback(rank, 2), bias=True)
        row.weight.data, row.bias.data = weight[:, 3 * rank : 3 * rank + 3], bias  # type: ignore[union-attr]
        total += row(y[:, 3 * rank : 3 * rank + 3])
    torch.testing.assert_close(total, y @ weight.T + bias)  # the bias once, not once a rank
