"""How fast a device's memory is, measured: the limit of whatever reads a lot and computes little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_core.cli.bench.timing import least_seconds

if TYPE_CHECKING:
    import torch

_BYTES = {"cpu": 512 * 1024**2, "cuda": 2 * 1024**3}
"""More than any cache of the device, and on a GPU enough for the start of a kernel not to count."""


def read_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second that the device reads: the best of several large sums and several large copies.

    A sum writes nothing, as hardly anything of a decode step does; a copy, counted by what it reads and writes, is
    faster where few threads add more slowly than the memory delivers.
    """
    import torch

    size = _BYTES.get(device.type, _BYTES["cpu"])
    # Written once: memory that never was is one page of zeros, which the cache holds.
    source = torch.ones(size // 4, device=device)
    total = source.new_empty(())
    best = size / least_seconds(lambda: torch.sum(source, 0, out=total), device, repeats)
    half = source.view(2, -1)
    return max(best, size / least_seconds(lambda: half[1].copy_(half[0]), device, repeats))
