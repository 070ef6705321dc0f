"""Packed weights: the same product, and the plain weight does not stay in memory beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from trtllm_core.backends.torch.kernels import choose_kernels, doubled_rms_norm, widened_linear
from trtllm_core.backends.torch.packing import can_pack, packed_linear
from trtllm_core.engine.weights import Weights, write_weights
from trtllm_core.nn import ColumnLinear, RMSNorm
from trtllm_core.parallel import TensorParallel

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 65])
def test_a_packed_product_is_the_product(rows: int, bias: bool) -> None:
    """In float32, which every CPU can pack; the layout is oneDNN's own business."""
    weight, b = torch.randn(96, 64), torch.randn(96) if bias else None
    x = torch.randn(rows, 128)[:, :64]  # rows that are no neighbours, as a norm may leave them
    evicted = []
    linear = packed_linear(weight, evicted.append)
    torch.testing.assert_close(linear(x, weight, b), functional.linear(x, weight, b), rtol=1e-4, atol=1e-4)
    assert evicted[0] is weight


def test_packing_is_for_bfloat16_where_the_cpu_computes_in_it() -> None:
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
    layer = ColumnLinear(64, 96, TensorParallel())
    layer.weight.data = torch.randn(96, 64).bfloat16()
    choose_kernels(layer, CPU, torch.bfloat16, False)
    x = torch.randn(5, 64).bfloat16()
    expected = functional.linear(x.float(), layer.weight.float())
    assert (layer(x).float() - expected).abs().max() < 2e-2 * expected.abs().max()


def resident(path: Path) -> int:
    """KiB of a mapped file that are in this process's memory."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
    return sum(int(found[1]) for part in parts if path.name in part and (found := re.search(r"Rss: +(\d+)", part)))


def test_an_evicted_weight_leaves_memory_and_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "evicted-weights.safetensors"
    made = {"a": torch.randn(1024, 1024), "b": torch.randn(8, 8)}
    write_weights(path, {name: tuple(one.shape) for name, one in made.items()}, torch.float32, made.items(), {})
    weights = Weights(path, CPU)
    assert torch.equal(weights.tensors["a"], made["a"])
    assert resident(path) > 4000
    weights.evict(weights.tensors["a"])
    assert resident(path) < 200
    assert torch.equal(weights.tensors["a"], made["a"])
    weights.evict(torch.ones(4096))
    weights.evict(weights.tensors["b"])
    assert torch.equal(weights.tensors["b"], made["b"])


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_rms_norm_as_a_doubled_layer_norm(rows: int) -> None:
    norm = RMSNorm(64, 1e-5)
    norm.weight.data = torch.randn(64).bfloat16()
    x = (torch.randn(rows, 64) * 5 + 3).bfloat16()
    exact = functional.rms_norm(x.float(), (64,), norm.weight.float(), 1e-5)
    ours = doubled_rms_norm(norm.weight, 1e-5)(x).float()
    assert ((ours - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), "within the rounding of bfloat16"


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_widened_product(rows: int) -> None:
    weight, bias, x = torch.randn(2500, 64).bfloat16(), torch.randn(2500).bfloat16(), torch.randn(rows, 64).bfloat16()
    exact = functional.linear(x.float(), weight.float(), bias.float())
    ours = widened_linear(x, weight, bias).float()
    assert (ours - exact).abs().max() < 1e-2 * exact.abs().max()
