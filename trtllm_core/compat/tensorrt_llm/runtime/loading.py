"""Where engines run: on the GPU where there is one, as classic scripts take for granted, and with whom."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from trtllm_core.compat.tensorrt_llm import _utils
from trtllm_core.config import EngineConfig, Mapping
from trtllm_core.parallel import init_tensor_parallel


def load_options(config: EngineConfig, mapping: Mapping) -> dict[str, Any]:
    """The backend's options for a rank: its device, and how it meets the other ranks."""
    options: dict[str, Any] = {}
    if config.backend.name == "torch" and torch.cuda.is_available():
        options["device"] = f"cuda:{mapping.local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(options["device"])
    if mapping.tp_size > 1:
        options["parallel"] = init_tensor_parallel(mapping, init_method=_meeting_place())
    return options


def _meeting_place() -> str | None:
    """Where ranks that mpirun started meet for tensors, which rank 0 says to all; None: the environment knows."""
    if "MASTER_ADDR" in os.environ or not _utils.started_by_mpi():
        return None
    comm = _utils.mpi_comm()
    place = None
    if comm.Get_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            place = f"tcp://{socket.gethostname()}:{free.getsockname()[1]}"
    return str(comm.bcast(place, 0))
