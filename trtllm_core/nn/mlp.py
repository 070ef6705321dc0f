"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from trtllm_core.nn.layer import Layer
from trtllm_core.nn.linear import ColumnLinear, RowLinear
from trtllm_core.parallel import TensorParallel


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The approximation of GELU that GPT-2 made common."""
    return functional.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """``max(x, 0)²``."""
    return functional.relu(x).square()


Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": functional.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": functional.relu,
    "relu2": relu_squared,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""By the names that checkpoints use."""


class MLP(Layer):
    """``down(act(up(x)))``.

    ``inner`` may be put in place by a backend: all that comes before ``down``, in fewer kernels.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, parallel: TensorParallel, bias: bool = False
    ) -> None:
        super().__init__()
        self.up = ColumnLinear(hidden_size, intermediate_size, parallel, bias)
        self.down = RowLinear(intermediate_size, hidden_size, parallel, bias)
        self.activation = ACTIVATIONS[activation]
        self.inner: Activation | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape, plus ``residual``: see ``RowLinear``."""
        inner = self.activation(self.up(x)) if self.inner is None else self.inner(x)
        return self.down(inner, residual)  # type: ignore[no-any-return]


class GatedMLP(Layer):
    """``down(act(gate(x)) * up(x))``, gate and up in one product: ``gate_up`` holds gate's rows, then up's.

    ``inner`` is as of ``MLP``.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, parallel: TensorParallel, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(hidden_size, 2 * intermediate_size, parallel, bias)
        self.down = RowLinear(intermediate_size, hidden_size, parallel, bias)
        self.activation = ACTIVATIONS[activation]
        self.inner: Activation | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape, plus ``residual``: see ``RowLinear``."""
        if self.inner is not None:
            return self.down(self.inner(x), residual)  # type: ignore[no-any-return]
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up, residual)  # type: ignore[no-any-return]
