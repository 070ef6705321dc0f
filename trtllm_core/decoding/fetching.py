"""``HostCopy``: how numbers of a step come to the host, which is when the host waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TURNS = 4
"""Pinned buffers in turn: a copy may be on its way while the ones before it are waited for and read."""


@dataclass(frozen=True, slots=True)
class Coming:
    """A copy on its way."""

    here: torch.Tensor
    arrived: Any
    """The event behind the copy; None: there was nothing to copy."""

    def wait(self) -> np.ndarray:
        """The numbers, int64, good until as many copies have begun as there are ``TURNS``."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.here.numpy()


class HostCopy:
    """Copies tensors of a GPU through pinned memory; to wait for one is to wait for nothing queued after it.

    Args:
        device: of the tensors. On the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        event: Any = torch.cuda.Event
        self._events = [event() for _ in range(TURNS)] if self._cuda else []
        self._pinned = [torch.empty(0, dtype=torch.int64)] * TURNS
        self._turn = 0

    def start(self, tensor: torch.Tensor) -> Coming:
        """Queue the copy of ``tensor`` (int64) behind what the current stream has. Nobody waits."""
        if not self._cuda:
            return Coming(tensor, None)
        turn = self._turn = (self._turn + 1) % TURNS
        count = tensor.numel()
        if count > len(self._pinned[turn]):
            self._pinned[turn] = torch.empty(1 << (count - 1).bit_length(), dtype=torch.int64, pin_memory=True)
        here = self._pinned[turn][:count].view(tensor.shape)
        here.copy_(tensor, non_blocking=True)
        self._events[turn].record()
        return Coming(here, self._events[turn])
