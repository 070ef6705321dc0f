"""Rows of one token each, as kernels that were captured read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows of one token each, described on the device: what a captured kernel reads when it runs."""

    past: torch.Tensor
    """int32 ``[rows]``: tokens cached before this call; -1: no row, nothing is read or written for it."""
    positions: torch.Tensor
    """int32 ``[rows]``: which angles turn queries and keys."""
    tables: torch.Tensor
    """int32 ``[rows * width]`` or longer: blocks of each row's cache."""
    width: torch.Tensor
    """int32 ``[1]``: blocks of a row of ``tables``."""
    longest: int
    """Entries that a row's cache may have at most, now or when a captured kernel runs."""
