"""Activations, and the gate of a gated feed-forward block, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.support import launch_options

NAMES = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu2")
"""Activations that kernels know, by their number there."""

_BLOCK = 1024


def activated(x: torch.Tensor, name: str, gated: bool) -> torch.Tensor:
    """``act(x)``, or ``act(gate) * up`` of ``x = (gate, up)`` side by side.

    Args:
        x: ``[..., width]``; gated, ``[..., 2 * width]``.
        name: one of ``NAMES``.
        gated: as above.

    Returns:
        ``[..., width]``.
    """
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    _activate[(rows.shape[0], triton.cdiv(width, _BLOCK))](
        rows,
        out,
        width,
        KIND=NAMES.index(name),
        GATED=gated,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(x.device),
    )
    return out


@triton.jit
def act(x, KIND: tl.constexpr):
    """``x`` (float32) through the activation number ``KIND``."""
    if KIND == 1:
        x = x * tl.sigmoid(x)
    if KIND == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if KIND == 3:
        # 0.5 (1 + tanh z) is sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if KIND == 4:
        x = tl.maximum(x, 0.0)
    if KIND == 5:
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@triton.jit
def _activate(x_ptr, out_ptr, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if GATED:
        x_ptr += row * 2 * width
        y = act(tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32), KIND)
        y = y * tl.load(x_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    else:
        y = act(tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32), KIND)
    tl.store(out_ptr + row * width + column, y.to(out_ptr.dtype.element_ty), mask=inside)
