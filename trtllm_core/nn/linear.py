"""Linear layers, split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.config import QuantizedLayer
from trtllm_core.nn.layer import Layer
from trtllm_core.parallel import TensorParallel

MatMul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``(x [..., in], weight [out, in], bias [out] or None) -> [..., out]``."""

AddMatMul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(x [..., in], residual [..., out]) -> residual + x Wᵀ + b``, which may be written over ``residual``."""


class Linear(Layer):
    """``y = x Wᵀ + b`` with the whole weight on every rank.

    ``matmul`` is the kernel. A backend may put a faster, a quantised or a batch-invariant one in its place when it
    loads the engine; families never notice.

    Where ``quantized`` says how, ``weight`` holds codes and other parameters what they are worth: see ``nn.quantized``.
    """

    quantized: QuantizedLayer | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.matmul: MatMul = functional.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in_features] -> [..., out_features]``."""
        return self.matmul(x, self.weight, self.bias)


class ColumnLinear(Linear):
    """Output features are split: each rank has its share, and nothing is communicated."""

    def __init__(self, in_features: int, out_features: int, parallel: TensorParallel, bias: bool = False) -> None:
        super().__init__(in_features, len(parallel.span(out_features)), bias)


class QKVLinear(Linear):
    """Queries, keys and values in one product: output ``[..., (heads + 2 * kv_heads) * head_size]`` of this rank.

    Where there are fewer key/value heads than ranks, each rank has a whole one, repeated on its neighbours.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        parallel: TensorParallel,
        bias: bool = False,
    ) -> None:
        self.num_heads = len(parallel.span(num_heads))
        self.num_kv_heads = len(parallel.kv_span(num_kv_heads))
        self.head_size = head_size
        super().__init__(hidden_size, (self.num_heads + 2 * self.num_kv_heads) * head_size, bias)


class RowLinear(Linear):
    """Input features are split: the ranks' partial products are summed. The bias is added once, by rank 0.

    ``add`` may be put in place by a backend, as ``matmul`` may: the product and the residual in one kernel.
    """

    def __init__(self, in_features: int, out_features: int, parallel: TensorParallel, bias: bool = False) -> None:
        super().__init__(len(parallel.span(in_features)), out_features, bias)
        self.parallel = parallel
        self.add: AddMatMul | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., in_features / ranks] -> [..., out_features]``, the same on every rank, plus ``residual``.

        ``residual [..., out_features]`` is given away: the result may be written over it.
        """
        if residual is not None and self.add is not None:
            return self.add(x, residual)
        bias = self.bias if self.parallel.rank == 0 else None
        y = self.parallel.all_reduce(self.matmul(x, self.weight, bias))
        return y if residual is None else residual + y
