"""Whether this machine runs the Triton kernels, and how it launches them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

HOPPER = (9, 0)
"""The compute capability from which kernels can be launched before the one before them is done, and from which PyTorch
multiplies rows of fp8 with a scale each."""
ADA = (8, 9)
"""The compute capability from which there are conversions to and from fp8."""
AMPERE = (8, 0)
"""The compute capability from which there are matrix products in bfloat16."""


@cache
def unsupported(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``; None: they do."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return "the GPU is older than compute capability 8.0"
    return None


@cache
def early_launch(device: torch.device) -> bool:
    """Whether kernels on ``device`` use programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER


def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of every launch on ``device``: the kernel's own ``PDL``, and Triton's."""
    return {"PDL": True, "launch_pdl": True} if early_launch(device) else {"PDL": False}


def up(number: int) -> int:
    """The power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
