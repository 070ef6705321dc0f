"""``HostCopy``: how numbers of a step come to the host, which is when the host waits for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class HostCopy:
    """Copies tensors of a GPU through pinned memory, and waits for nothing that was queued after them.

    Args:
        device: of the tensors. On the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned = torch.empty(0, dtype=torch.int64)

    def of(self, tensor: torch.Tensor) -> np.ndarray:
        """``tensor`` (int64) as an array, good until the next call."""
        if self._event is None:
            return tensor.numpy()
        count = tensor.numel()
        if count > len(self._pinned):
            self._pinned = torch.empty(1 << (count - 1).bit_length(), dtype=torch.int64, pin_memory=True)
        here = self._pinned[:count].view(tensor.shape)
        here.copy_(tensor, non_blocking=True)
        self._event.record()
        self._event.synchronize()
        return here.numpy()
