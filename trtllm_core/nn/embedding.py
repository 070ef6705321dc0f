"""Token embedding and language-model head, split over the vocabulary; learned positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.nn.layer import Layer
from trtllm_core.nn.linear import Linear
from trtllm_core.parallel import TensorParallel, padded_vocab


class LMHead(Linear):
    """Logits over the vocabulary, padded to a multiple of the ranks and gathered on every rank."""

    def __init__(self, vocab_size: int, hidden_size: int, parallel: TensorParallel, bias: bool = False) -> None:
        super().__init__(hidden_size, padded_vocab(vocab_size, parallel.size) // parallel.size, bias)
        self.parallel = parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., hidden_size] -> [..., vocab_size_padded]``, the same on every rank."""
        return self.parallel.all_gather(super().forward(x))


class VocabParallelEmbedding(LMHead):
    """A token's row of the table, times ``scale``. ``logits`` uses the same table as a head, for models that tie them.

    ``replace`` may be put in place by a backend: it is given all rows, ``[..., hidden_size]``, and may write others
    over some of them, as prompt tables ask. ``lookup`` takes rows out of the table. Families never notice.
    """

    def __init__(self, vocab_size: int, hidden_size: int, parallel: TensorParallel, scale: float = 1.0) -> None:
        super().__init__(vocab_size, hidden_size, parallel)
        self.scale = scale
        self.replace: Callable[[torch.Tensor], None] | None = None
        self.lookup: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = functional.embedding

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``input_ids [...]`` (any integer type) ``-> [..., hidden_size]``, the same on every rank."""
        rows = self._rows(input_ids)
        if self.scale != 1.0:
            rows *= self.scale
        if self.replace is not None:
            self.replace(rows)
        return rows

    def _rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.parallel.size == 1:
            return self.lookup(input_ids, self.weight)
        local = input_ids - self.parallel.rank * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = self.lookup(torch.where(mine, local, 0), self.weight)
        return self.parallel.all_reduce(rows * mine.unsqueeze(-1))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., hidden_size] -> [..., vocab_size_padded]`` with the table as the head."""
        return super().forward(x)


class PositionEmbedding(Layer):
    """A learned row for each position, whole on every rank. Its length is the longest sequence that the model knows."""

    def __init__(self, positions: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(positions, hidden_size), requires_grad=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """``positions [...]``, as ``AttentionContext.positions``, ``-> [..., hidden_size]``."""
        return functional.embedding(positions, self.weight)
