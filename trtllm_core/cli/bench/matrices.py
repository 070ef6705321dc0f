"""How fast a device multiplies matrices, measured: the limit of whatever computes a lot for what it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_core.cli.bench.timing import least_seconds

if TYPE_CHECKING:
    import torch

_SIZES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns: enough for the products to fill the device, and for the start of one not to count."""


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations a second (a product of two numbers and its sum are two) of a square product: the best of several.

    The numbers are random, as weights are: of zeros and ones a GPU multiplies more, because it draws less power.
    """
    import torch

    size = _SIZES.get(device.type, _SIZES["cpu"])
    random = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.empty(size, size, dtype=dtype, device=device).normal_(0, 0.02, generator=random) for _ in range(2)
    )
    out = torch.empty_like(left)
    return 2 * size**3 / least_seconds(lambda: torch.mm(left, right, out=out), device, repeats)
