"""Memory that somebody else owns, as a tensor."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Pointer:
    """An address, and what lies there: contiguous, and alive until the run that it is passed to is over."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device | None = None
    """Whose memory it is; None: the engine's."""

    def tensor(self, default: torch.device) -> torch.Tensor:
        """A view of it, nothing is copied."""
        device = self.device or default
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        if not size:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        if device.type == "cpu":
            raw = torch.frombuffer((ctypes.c_char * size).from_address(self.address), dtype=torch.uint8)
        else:
            raw = torch.as_tensor(_CudaBytes(self.address, size), device=device)
        return raw.view(self.dtype).view(self.shape)


class _CudaBytes:
    """Bytes on a GPU, by the protocol that PyTorch reads. It knows no bfloat16; so it is told of bytes alone."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
