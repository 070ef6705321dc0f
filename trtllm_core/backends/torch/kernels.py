"""Which matrix product and activation the layers use, chosen once when an engine is loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.backends.torch.cuda.support import unsupported
from trtllm_core.backends.torch.cuda.switch import Switch
from trtllm_core.backends.torch.packing import can_pack, packed_linear
from trtllm_core.nn import MLP, GatedMLP, Linear, RMSNorm
from trtllm_core.nn.linear import MatMul
from trtllm_core.nn.norm import Norm

WIDEN_FROM = 12
"""Rows from which ``widened_linear`` goes through float32."""

WIDEN_PIECE = 1024
"""Rows of a weight that it converts at a time."""
DOUBLE_UP_TO = 32
"""Rows up to which ``doubled_rms_norm`` is used."""

INVARIANT_ELEMENTS = 16384
"""Elements of one elementwise call in batch-invariant mode: few enough that PyTorch runs it on one thread."""


def choose_kernels(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    batch_invariant: bool,
    evict: Callable[[torch.Tensor], None] = lambda weight: None,
    plain: bool = False,
) -> Switch | None:
    """Give every layer of the module the kernel that suits the machine. Called once the weights are in place.

    Returns what turns on the kernels that only captured graphs use; None: there are none.

    Args:
        module: of a family.
        device, dtype: of its weights.
        batch_invariant: whether a row's result may depend on others.
        evict: is told of weights that were copied into another layout: see ``Weights.evict``.
        plain: whether products are what the layers say and nothing else: one rank, no adapters.
    """
    switch = None
    if dtype != torch.float32 and unsupported(device) is None:
        from trtllm_core.backends.torch.cuda.layers import accelerate

        switch = accelerate(module, dtype, plain)
    kernel = plain_product(device, dtype, batch_invariant)
    pack = kernel is functional.linear and can_pack(device, dtype)
    for layer in module.modules():
        if isinstance(layer, Linear) and device.type != "cuda" and layer.quantized is None:
            layer.matmul = packed_linear(layer.weight, evict) if pack else kernel
        elif batch_invariant and isinstance(layer, (MLP, GatedMLP)):
            layer.activation = invariant_rows(layer.activation)
        elif isinstance(layer, RMSNorm) and device.type == "cpu" and dtype != torch.float32:
            layer.kernel = doubled_rms_norm(layer.weight, layer.eps)
        # nn.Module finds parameters and submodules in Python's slow path; in the instance's own dict they are found at
        # once. The weights move no more.
        layer.__dict__.update(layer._parameters | layer._modules)
    return switch


def plain_product(device: torch.device, dtype: torch.dtype, batch_invariant: bool) -> MatMul:
    """The product with a weight that stays as it is."""
    if batch_invariant:
        return invariant_linear
    slow_half = (
        device.type == "cpu" and dtype != torch.float32 and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    )
    return widened_linear if slow_half else functional.linear


def widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """For CPUs without half-precision matrix instructions: products of several rows go through float32.

    There, PyTorch's own half-precision product takes as long for each row as for the first, so that from about a dozen
    rows on even converting the weight every time is cheaper (AVX2, 2 threads: twice at 16 rows, 6 times at 512). It
    is converted piece by piece, so that a piece stays in the cache between its conversion and its use.
    """
    if x.numel() < WIDEN_FROM * x.shape[-1]:
        return functional.linear(x, weight, bias)
    wide = x.float()
    parts = [functional.linear(wide, piece.float()).to(x.dtype) for piece in torch.split(weight, WIDEN_PIECE)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if bias is None else out + bias


def doubled_rms_norm(weight: torch.Tensor, eps: float) -> Norm:
    """RMS norm as the layer norm of ``(x, -x)``, whose mean is 0 and whose variance is the mean of ``x²``.

    PyTorch has one fused norm on the CPU, and this is not it: its RMS norm is ten small calls in half precision, which
    takes twice as long for one row. Equal to it within the rounding of the result.
    """
    size = weight.shape[0]
    twice = torch.cat((weight, weight))

    def norm(x: torch.Tensor) -> torch.Tensor:
        if x.numel() > DOUBLE_UP_TO * size:
            return functional.rms_norm(x, (size,), weight, eps)
        return functional.layer_norm(torch.cat((x, -x), -1), (2 * size,), twice, None, eps)[..., :size]

    return norm


def invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Every row is a product of its own, read from the same aligned place.

    A library chooses its kernel, and with it the order of the sum, by the shape and by how the memory lies; within a
    tile of several rows it may compute the last ones in another way than the first.
    """
    rows = x.reshape(-1, x.shape[-1])
    row = torch.empty_like(rows[:1])
    out = torch.cat([functional.linear(row.copy_(one), weight, bias) for one in torch.split(rows, 1)])
    return out.view(*x.shape[:-1], weight.shape[0])


def invariant_rows(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """An elementwise function whose result for an element does not depend on where in the tensor it stands.

    PyTorch computes silu and gelu with vectors, but the elements that are left over at the end of a thread's share
    with the scalar library, which rounds differently. Rows padded to whole vectors, on one thread, leave none over.
    """

    def apply(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        rows = functional.pad(x.reshape(-1, width), (0, -width % 64))
        tiles = [function(tile) for tile in torch.split(rows, max(1, INVARIANT_ELEMENTS // rows.shape[1]))]
        return torch.cat(tiles)[:, :width].view(x.shape)

    return apply
