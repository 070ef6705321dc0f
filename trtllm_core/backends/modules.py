"""A family's module as backends need it: without memory first, then over an engine's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trtllm_core.config import EngineConfig
from trtllm_core.errors import EngineCorruptError
from trtllm_core.nn import Alibi, RotaryEmbedding
from trtllm_core.nn.quantized import make_quantized, use_plain_products
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import ModelFamily


def meta_module(config: EngineConfig, family: ModelFamily, parallel: TensorParallel) -> nn.Module:
    """The family's module without memory, in the engine's dtype, with the parameters of quantised layers."""
    dtype = getattr(torch, config.model.dtype)
    with torch.device("meta"):
        module = family.module(config.model, parallel).to(dtype).eval()
    if config.quantization is not None:
        # A graph computes in one type; the torch backend keeps what the scales are.
        make_quantized(module, config.quantization, torch.float32 if config.contract == "packed_paged" else dtype)
    return module


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, in the module's order."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def parameter_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """The type of each parameter: the engine's dtype, but for codes and scales."""
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


def fill(module: nn.Module, config: EngineConfig, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put an engine's weights in place, which stay what they are, and make the tables of positions.

    Raises:
        EngineCorruptError: the weights are not those that the config says.
    """
    expected = {name: (tuple(one.shape), one.dtype) for name, one in module.named_parameters()}
    found = {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()}
    if found != expected:
        wrong = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise EngineCorruptError(f"the engine's weights do not fit its config, first at {wrong!r}: build it again")
    module.load_state_dict(dict(tensors), assign=True)
    use_plain_products(module, getattr(torch, config.model.dtype))
    for layer in module.modules():
        if isinstance(layer, RotaryEmbedding):
            layer.prepare(config.build.max_seq_len, device, getattr(torch, config.model.dtype))
        elif isinstance(layer, Alibi):
            layer.prepare(device)
