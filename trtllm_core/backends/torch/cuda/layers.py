"""Gives the layers of a module their CUDA kernels, when an engine is loaded."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.backends.torch.cuda.kernels.coded import Codes
from trtllm_core.backends.torch.cuda.kernels.norm import norm
from trtllm_core.backends.torch.cuda.product import FUNCTIONS, Product, activate
from trtllm_core.backends.torch.cuda.switch import Switch
from trtllm_core.backends.torch.cuda.tuning import SAMPLED, Choice, Tunings
from trtllm_core.backends.torch.cuda.weights import codes_of
from trtllm_core.nn import MLP, GatedMLP, LayerNorm, Linear, RMSNorm, RowLinear
from trtllm_core.nn.mlp import Activation
from trtllm_core.nn.norm import Norm

_ACTIVATIONS = {function: name for name, function in FUNCTIONS.items()}


def accelerate(module: nn.Module, dtype: torch.dtype, plain: bool, tunings: Tunings | None = None) -> Switch:
    """Norms, activations and products of few rows by the kernels, in every layer that has a kernel.

    Returns what turns them on: a module runs PyTorch's own until then, but for products with quantised weights.

    Args:
        module: weights in place, on a CUDA device.
        dtype: of the weights that are not quantised; those in another one are left alone.
        plain: whether products are what the layers say and nothing else: one rank, no adapters. Else those with
            quantised weights alone are replaced.
        tunings: which kernel a product gets; None: this machine's.
    """
    tunings, switch = tunings or Tunings(), Switch()
    layers = list(module.modules())
    for layer in layers:
        if isinstance(layer, (RMSNorm, LayerNorm)):
            layer.kernel = _normed(layer, switch)
        elif isinstance(layer, (MLP, GatedMLP)) and layer.activation in _ACTIVATIONS:
            layer.inner = _inner(layer, switch)
    _products(layers, dtype, plain, tunings, switch)
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


def _products(layers: list[nn.Module], dtype: torch.dtype, plain: bool, tunings: Tunings, switch: Switch) -> None:
    """Products of few rows, with what follows them. Layers that are alike get the same kernels."""
    blocks: dict[nn.Module, MLP | GatedMLP] = {}
    for layer in layers:
        if isinstance(layer, (MLP, GatedMLP)) and layer.activation in _ACTIVATIONS:
            blocks[layer.gate_up if isinstance(layer, GatedMLP) else layer.up] = layer
    alike: dict[tuple[Any, ...], list[tuple[Linear, torch.Tensor | Codes]]] = defaultdict(list)
    for layer in layers:
        weight = _weight(layer, dtype, plain) if isinstance(layer, Linear) else None
        if isinstance(layer, Linear) and weight is not None:
            block = blocks.get(layer)
            activation = "none" if block is None else _ACTIVATIONS[block.activation]
            product = Product(activation, isinstance(block, GatedMLP), plain and isinstance(layer, RowLinear))
            alike[product, layer.quantized, weight.shape, layer.bias is not None].append((layer, weight))
    for (product, *_), group in alike.items():
        first = group[0][0]
        most = max(1, SAMPLED // first.weight.nbytes)
        choice = Choice(tunings, product, [weight for _, weight in group[:most]], first.bias)
        choice(1)
        for layer, weight in group:
            _give(layer, weight, product, choice, blocks.get(layer), switch)
    tunings.save()


def _weight(layer: Linear, dtype: torch.dtype, plain: bool) -> torch.Tensor | Codes | None:
    """What the layer multiplies with; None: it is left as it is."""
    if layer.quantized is not None:
        return codes_of(layer)
    return layer.weight if plain and layer.matmul is functional.linear and layer.weight.dtype == dtype else None


def _give(
    layer: Linear,
    weight: torch.Tensor | Codes,
    product: Product,
    choice: Choice,
    block: MLP | GatedMLP | None,
    switch: Switch,
) -> None:
    inputs, quantised = weight.shape[1], not isinstance(weight, torch.Tensor)

    def run(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor:
        how = choice(x.numel() // inputs) if quantised or switch.on else None
        return product.run(how, x, weight, bias, residual, switch.on)

    if block is not None:
        block.inner = lambda x: run(x, layer.bias)
        return
    if product.added:
        layer.add = lambda x, residual: run(x, layer.bias, residual)  # type: ignore[assignment]
    layer.matmul = lambda x, _, bias: run(x, bias)
