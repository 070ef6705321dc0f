"""Where engines run: on the GPU where there is one, as classic scripts take for granted."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_core.config import EngineConfig, Mapping
from trtllm_core.parallel import init_tensor_parallel


def load_options(config: EngineConfig, mapping: Mapping) -> dict[str, Any]:
    """The backend's options for a rank: its device, and how it meets the other ranks."""
    options: dict[str, Any] = {}
    if config.backend.name == "torch" and torch.cuda.is_available():
        options["device"] = f"cuda:{mapping.local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(options["device"])
    if mapping.tp_size > 1:
        options["parallel"] = init_tensor_parallel(mapping)
    return options
