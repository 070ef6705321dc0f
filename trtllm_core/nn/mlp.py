"""Feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from trtllm_core.nn.layer import Layer
from trtllm_core.nn.linear import ColumnLinear, RowLinear
from trtllm_core.parallel import TensorParallel

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
"""By the names that checkpoints use."""


class GatedMLP(Layer):
    """``down(act(gate(x)) * up(x))``, gate and up in one product: ``gate_up`` holds gate's rows, then up's."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, parallel: TensorParallel, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(hidden_size, 2 * intermediate_size, parallel, bias)
        self.down = RowLinear(intermediate_size, hidden_size, parallel, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., hidden_size] ->`` same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]
