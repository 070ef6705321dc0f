"""Products and what follows them, by the library or by a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from trtllm_core.backends.torch.cuda.kernels.activation import activated
from trtllm_core.backends.torch.cuda.kernels.gemv import Tiling, gemv
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
        tiling: Tiling | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        fused: bool = True,
    ) -> torch.Tensor:
        """``x [rows, in]`` by the library (``tiling`` None), or one row and all that follows by one kernel.

        ``fused``: whether the activation behind the library's product is a kernel of ours.
        """
        if tiling is not None:
            return gemv(x, weight, bias, tiling, activation=self.activation, gated=self.gated, residual=residual)
        if residual is not None:
            if bias is None:
                return residual.addmm_(x, weight.t())
            return residual.add_(functional.linear(x, weight, bias))
        y = functional.linear(x, weight, bias)
        return y if self.activation == "none" else activate(y, self.activation, self.gated, fused)
