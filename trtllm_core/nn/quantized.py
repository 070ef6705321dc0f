"""Quantised weights in layers: a plain product over them, which backends replace by faster ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.config import Quantization, QuantizedLayer
from trtllm_core.nn.embedding import LMHead, VocabParallelEmbedding
from trtllm_core.nn.linear import Linear
from trtllm_core.quantize import QuantizedWeight, part_shapes


def quantizable(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The layers that may be quantised: all linear ones. An embedding is one where its table is also the head."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Linear)]
    untied = any(is_head(layer) and not isinstance(layer, VocabParallelEmbedding) for _, layer in layers)
    return ((name, one) for name, one in layers if not (untied and isinstance(one, VocabParallelEmbedding)))


def is_head(layer: Linear) -> bool:
    """Whether the layer makes logits."""
    return isinstance(layer, LMHead)


def make_quantized(module: nn.Module, quantization: Quantization, scales: torch.dtype) -> None:
    """Give the layers of a module without memory the parameters of their quantised weights.

    ``weight`` becomes the codes; the other parts are parameters under their own names, floating-point ones in
    ``scales``.
    """
    for name, how in quantization.layers.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, Linear)
        for part, shape in part_shapes(how, tuple(layer.weight.shape)).items():
            dtype = torch.uint8 if part in ("codes", "zero_points") else scales
            empty = torch.empty(shape, dtype=dtype, device=layer.weight.device)
            setattr(layer, parameter_name(part), nn.Parameter(empty, requires_grad=False))
        layer.quantized = how


def parameter_name(part: str) -> str:
    """Of a layer, for a part of its quantised weight."""
    return "weight" if part == "codes" else part


def weight_of(layer: Linear) -> QuantizedWeight:
    """The weight of a layer that is quantised, over its parameters."""
    how: QuantizedLayer | None = layer.quantized
    assert how is not None
    parts = {part: layer.get_parameter(parameter_name(part)).detach() for part in part_shapes(how, (1, how.group_size))}
    return QuantizedWeight(how, **parts)


def use_plain_products(module: nn.Module, dtype: torch.dtype) -> None:
    """Let every quantised layer dequantise its weight in each call: right everywhere, and fast nowhere."""
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.quantized is not None:
            weight = weight_of(layer)
            layer.matmul = PlainProduct(weight)
            if isinstance(layer, VocabParallelEmbedding):
                layer.lookup = PlainLookup(weight, dtype)


class PlainProduct:
    """See ``MatMul``. The twin that faster ones are tested against."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., in] -> [..., out]``."""
        return functional.linear(x, self.weight.dequantize().to(x.dtype), bias)


class PlainLookup:
    """Rows of a quantised table, in the engine's dtype."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def __call__(self, input_ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """``input_ids [...] -> [..., in]``."""
        return self.weight.dequantize(input_ids).to(self.dtype)
