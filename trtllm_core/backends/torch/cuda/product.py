"""Products and what follows them, by the library or by a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from trtllm_core.backends.torch.cuda.kernels.activation import activated
from trtllm_core.backends.torch.cuda.kernels.coded import Codes, coded_gemv
from trtllm_core.backends.torch.cuda.kernels.gemv import Tiling, gemv
from trtllm_core.backends.torch.cuda.kernels.skinny import Blocks, skinny
from trtllm_core.backends.torch.cuda.library import library_product
from trtllm_core.nn.mlp import Activation, gelu_tanh, relu_squared

FUNCTIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": functional.relu,
    "relu2": relu_squared,
}
"""The activations that there is a kernel for, by their names there."""


def activate(x: torch.Tensor, name: str, gated: bool, fused: bool) -> torch.Tensor:
    """See ``activated``; ``fused``: by the kernel."""
    if fused:
        return activated(x, name, gated)
    if not gated:
        return FUNCTIONS[name](x)
    gate, other = x.chunk(2, dim=-1)
    return FUNCTIONS[name](gate) * other


@dataclass(frozen=True)
class Product:
    """A kind of product, and what follows it, as layers ask for it: see ``gemv``."""

    activation: str = "none"
    gated: bool = False
    added: bool = False
    """Whether a residual may be added."""

    def run(
        self,
        how: Tiling | Blocks | None,
        x: torch.Tensor,
        weight: torch.Tensor | Codes,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        fused: bool = True,
    ) -> torch.Tensor:
        """``x [rows, in]``, and all that follows.

        Args:
            how: one row, or few, and what follows by kernels; None: by the library.
            residual: overwritten with the result; see ``gemv``.
            fused: whether the activation is a kernel of ours, where it is one by itself.
        """
        if how is None:
            y = library_product(x, weight, bias, residual)
            return y if self.activation == "none" else activate(y, self.activation, self.gated, fused)
        kind, gated = self.activation, self.gated
        if isinstance(how, Blocks):
            return skinny(x, weight, bias, how, activation=kind, gated=gated, residual=residual)
        if isinstance(weight, torch.Tensor):
            return gemv(x, weight, bias, how, activation=kind, gated=gated, residual=residual)
        return coded_gemv(x, weight, bias, how, activation=kind, gated=gated, residual=residual)
