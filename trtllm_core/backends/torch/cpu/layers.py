"""Gives the layers of a module the compiled kernels, when an engine is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.cpu.packed import can_pack
from trtllm_core.backends.torch.cpu.product import PackedProduct
from trtllm_core.nn import GatedMLP, Linear, RMSNorm, RowLinear, VocabParallelEmbedding
from trtllm_core.nn.linear import MatMul
from trtllm_core.nn.mlp import Activation
from trtllm_core.nn.quantized import weight_of


def accelerate(
    module: nn.Module, kernels: Kernels, product: MatMul, rounds: bool, evict: Callable[[torch.Tensor], None]
) -> None:
    """Norms, gates, lookups, and products with quantised weights in one call each.

    Args:
        module: weights in place, and of the kernels' dtype where they are taken.
        product: with weights in the engine's dtype.
        rounds: activations to 8 bits, where few rows meet quantised weights.
        evict: is told of weights that were packed; see ``Weights.evict``.
    """
    for layer in module.modules():
        if isinstance(layer, RMSNorm) and layer.weight.dtype == kernels.dtype:
            layer.kernel = _normed(layer, kernels)
        elif isinstance(layer, GatedMLP) and layer.activation is functional.silu:
            layer.inner = _gated(layer, kernels)
        elif isinstance(layer, Linear) and layer.quantized is not None and can_pack(weight_of(layer)):
            _pack(layer, PackedProduct(weight_of(layer), kernels, product, rounds))
            for part in layer.parameters():
                evict(part)
        elif isinstance(layer, VocabParallelEmbedding) and layer.weight.dtype == kernels.dtype:
            layer.lookup = _looked_up(kernels)


def packed_products(module: nn.Module) -> list[PackedProduct]:
    """Those that the module's layers have."""
    found = (getattr(layer, "matmul", None) for layer in module.modules())
    return [one for one in found if isinstance(one, PackedProduct)]


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the module's weights: of packed ones, as they are read."""
    total = sum(parameter.nbytes for parameter in module.parameters())
    for layer in module.modules():
        if isinstance(layer, Linear) and isinstance(layer.matmul, PackedProduct):
            total += layer.matmul.weight.tiles.nbytes - sum(part.nbytes for part in weight_of(layer).parts().values())
    return total


def _pack(layer: Linear, product: PackedProduct) -> None:
    layer.matmul = product
    if isinstance(layer, VocabParallelEmbedding):
        layer.lookup = product.lookup
    elif isinstance(layer, RowLinear) and layer.parallel.size == 1:
        bias = layer.bias
        layer.add = lambda x, residual: product.add(x, residual, bias)


def _normed(layer: RMSNorm, kernels: Kernels) -> Activation:
    weight, eps = layer.weight, layer.eps
    return lambda x: kernels.rms_norm(x, weight, eps)


def _gated(layer: GatedMLP, kernels: Kernels) -> Activation:
    """The product stays the layer's own, whatever it may be by then."""
    product = layer.gate_up
    return lambda x: kernels.silu_gate(product(x))


def _looked_up(kernels: Kernels) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda ids, table: kernels.copy_rows(table, ids.int())
