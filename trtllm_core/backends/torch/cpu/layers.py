"""Gives the layers of a module the compiled kernels, when an engine is loaded."""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.nn import GatedMLP, RMSNorm
from trtllm_core.nn.mlp import Activation


def accelerate(module: nn.Module, kernels: Kernels) -> None:
    """Norms and gates in one call each. Weights are in place, and of the kernels' dtype where they are taken."""
    for layer in module.modules():
        if isinstance(layer, RMSNorm) and layer.weight.dtype == kernels.dtype:
            layer.kernel = _normed(layer, kernels)
        elif isinstance(layer, GatedMLP) and layer.activation is functional.silu:
            layer.inner = _gated(layer, kernels)


def _normed(layer: RMSNorm, kernels: Kernels) -> Activation:
    weight, eps = layer.weight, layer.eps
    return lambda x: kernels.rms_norm(x, weight, eps)


def _gated(layer: GatedMLP, kernels: Kernels) -> Activation:
    """The product stays the layer's own, whatever it may be by then."""
    product = layer.gate_up
    return lambda x: kernels.silu_gate(product(x))
