"""Attention with linear biases (ALiBi, arXiv 2108.12409): scores fall with distance, and nothing else says where."""

from __future__ import annotations

import torch

from trtllm_core.nn.layer import Layer
from trtllm_core.parallel import TensorParallel


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slope of each of the model's heads.

    For ``n`` heads, a power of two, ``2 ** (-8 i / n)``, i from 1 on. Other counts take those of the power below, and
    then every other one of the power above.
    """
    power = 1 << num_heads.bit_length() - 1
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return tuple(slopes + between[: num_heads - power])


class Alibi(Layer):
    """The slopes of this rank's heads. Backends add ``-slope * distance`` to the scores.

    Args:
        num_heads: heads of the whole model: a slope goes with the head's number in it, whichever rank has the head.
        parallel: whose share of the heads this is.
    """

    def __init__(self, num_heads: int, parallel: TensorParallel) -> None:
        super().__init__()
        span = parallel.span(num_heads)
        self.slopes = alibi_slopes(num_heads)[span.start : span.stop]
        self.table: torch.Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Put the slopes on the device."""
        self.table = torch.tensor(self.slopes, dtype=torch.float32, device=device)

    def forward(self, offset: torch.Tensor) -> torch.Tensor:
        """``offset [..., n]``, positions of keys less those of their queries, ``-> float32 [..., heads, n]``."""
        assert self.table is not None, "prepare() comes first"
        return self.table[:, None] * offset.unsqueeze(-2)
