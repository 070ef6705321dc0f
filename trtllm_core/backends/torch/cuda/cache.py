"""Quantised keys and values on CUDA: coded and decoded in one kernel each."""

from __future__ import annotations

import torch

from trtllm_core.backends.torch.cuda.kernels.codes import read_blocks, write_codes
from trtllm_core.backends.torch.layer_cache import QuantizedCache


class CudaQuantizedCache(QuantizedCache):
    """As ``QuantizedCache``. What a ring does seldom stays with PyTorch."""

    def write(self, entries: torch.Tensor, kv: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        """See ``LayerCache``."""
        return write_codes(self, entries, kv) if which is None else super().write(entries, kv, which)

    def read(self, entries: slice) -> torch.Tensor:
        """See ``LayerCache``."""
        size = self.tokens_per_block
        first, last = entries.start // size, -(-entries.stop // size)
        found = self.blocks(torch.arange(first, last, device=self.data.device))
        return found[entries.start - first * size : entries.stop - first * size]

    def blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """See ``LayerCache``."""
        return read_blocks(self, blocks)
