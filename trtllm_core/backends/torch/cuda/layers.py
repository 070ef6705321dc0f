"""Gives the layers of a module their CUDA kernels, when an engine is loaded."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.backends.torch.cuda.kernels.gemv import Tiling
from trtllm_core.backends.torch.cuda.kernels.norm import norm
from trtllm_core.backends.torch.cuda.product import FUNCTIONS, Product, activate
from trtllm_core.backends.torch.cuda.switch import Switch
from trtllm_core.backends.torch.cuda.tuning import Tunings
from trtllm_core.nn import MLP, GatedMLP, LayerNorm, Linear, RMSNorm, RowLinear
from trtllm_core.nn.mlp import Activation
from trtllm_core.nn.norm import Norm

SAMPLE = 1 << 30
"""Bytes of weights of one shape that a measurement goes through: more than any cache holds."""

_ACTIVATIONS = {function: name for name, function in FUNCTIONS.items()}


def accelerate(module: nn.Module, dtype: torch.dtype, plain: bool, tunings: Tunings | None = None) -> Switch:
    """Norms, activations and products of one row by the kernels, in every layer that has a kernel.

    Returns what turns them on: a module runs PyTorch's own until then.

    Args:
        module: weights in place, on a CUDA device.
        dtype: of the weights; those of layers in another one, such as quantised ones, are left alone.
        plain: whether products are what the layers say and nothing else: one rank, no adapters.
        tunings: which kernel a product gets; None: this machine's.
    """
    tunings, switch = tunings or Tunings(), Switch()
    layers = list(module.modules())
    for layer in layers:
        if isinstance(layer, (RMSNorm, LayerNorm)):
            layer.kernel = _normed(layer, switch)
        elif isinstance(layer, (MLP, GatedMLP)) and layer.activation in _ACTIVATIONS:
            layer.inner = _inner(layer, switch)
    if plain:
        _products(layers, dtype, tunings, switch)
        tunings.save()
    return switch


def _normed(layer: RMSNorm | LayerNorm, switch: Switch) -> Norm:
    weight, eps, shape = layer.weight, layer.eps, layer.shape
    if isinstance(layer, RMSNorm):
        return lambda x: norm(x, weight, None, eps, False) if switch.on else functional.rms_norm(x, shape, weight, eps)
    bias = layer.bias
    return lambda x: (
        norm(x, weight, bias, eps, True) if switch.on else functional.layer_norm(x, shape, weight, bias, eps)
    )


def _inner(layer: MLP | GatedMLP, switch: Switch) -> Activation:
    """The product stays the layer's own, whatever it may be by then."""
    product, gated = (layer.gate_up, True) if isinstance(layer, GatedMLP) else (layer.up, False)
    name = _ACTIVATIONS[layer.activation]
    return lambda x: activate(product(x), name, gated, switch.on)


def _products(layers: list[nn.Module], dtype: torch.dtype, tunings: Tunings, switch: Switch) -> None:
    """Products of one row, with what follows them. Layers that are alike get the same kernel."""
    blocks: dict[nn.Module, MLP | GatedMLP] = {}
    for layer in layers:
        if isinstance(layer, (MLP, GatedMLP)) and layer.activation in _ACTIVATIONS:
            blocks[layer.gate_up if isinstance(layer, GatedMLP) else layer.up] = layer
    alike: dict[tuple[Product, torch.Size, bool], list[Linear]] = defaultdict(list)
    for layer in layers:
        if isinstance(layer, Linear) and _is_plain(layer, dtype):
            block = blocks.get(layer)
            activation = "none" if block is None else _ACTIVATIONS[block.activation]
            product = Product(activation, isinstance(block, GatedMLP), isinstance(layer, RowLinear))
            alike[product, layer.weight.shape, layer.bias is not None].append(layer)
    for (product, _, _), group in alike.items():
        most = max(1, SAMPLE // group[0].weight.nbytes)
        tiling = tunings.choose(product, [layer.weight for layer in group[:most]], group[0].bias)
        for layer in group:
            _give(layer, product, tiling, blocks.get(layer), switch)


def _is_plain(layer: Linear, dtype: torch.dtype) -> bool:
    """Whether the layer's product is the library's, of the weight as it is."""
    return layer.quantized is None and layer.matmul is functional.linear and layer.weight.dtype == dtype


def _give(layer: Linear, product: Product, tiling: Tiling | None, block: MLP | GatedMLP | None, switch: Switch) -> None:
    weight, bias = layer.weight, layer.bias
    inputs = weight.shape[1]

    def run(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        fits = switch.on and x.numel() == inputs
        return product.run(tiling if fits else None, x, weight, bias, residual, switch.on)

    if block is not None:
        block.inner = run
        return
    if isinstance(layer, RowLinear):
        layer.add = run
    if tiling is not None:
        layer.matmul = lambda x, weight, bias: run(x)
