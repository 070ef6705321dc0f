"""Helpers that old scripts import: names of dtypes, NumPy, and who this rank is."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_core.config.launch import env_world, mpi_world
from trtllm_core.errors import ConfigError, listing
from trtllm_core.parallel import padded_vocab

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "fp8": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

np_bfloat16 = np.dtype("V2", metadata={"dtype": "bfloat16"})
"""NumPy has no bfloat16: two bytes that only we can read."""

# -- dtypes ------------------------------------------------------------------------------------------------------------


def str_dtype_to_torch(dtype: str) -> torch.dtype:
    """``"float16"`` → ``torch.float16``.

    Raises:
        ConfigError: there is no dtype of that name.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r} (known: {listing(_DTYPES)})")
    return _DTYPES[dtype]


def torch_dtype_to_str(dtype: torch.dtype) -> str:
    """The reverse of ``str_dtype_to_torch``."""
    if dtype not in _NAMES:
        raise ConfigError(f"there is no name for {dtype} (known: {listing(_DTYPES)})")
    return _NAMES[dtype]


def str_dtype_to_np(dtype: str) -> np.dtype[Any]:
    """``"float16"`` → NumPy's; ``"bfloat16"`` → ``np_bfloat16``."""
    return np_bfloat16 if dtype == "bfloat16" else np.dtype("int8" if dtype == "fp8" else dtype)


def np_dtype_to_torch(dtype: np.dtype[Any] | type) -> torch.dtype:
    """The reverse of ``torch_dtype_to_np``."""
    return torch.bfloat16 if np.dtype(dtype) == np_bfloat16 else str_dtype_to_torch(np.dtype(dtype).name)


def torch_dtype_to_np(dtype: torch.dtype) -> np.dtype[Any]:
    """As ``str_dtype_to_np``."""
    return str_dtype_to_np(torch_dtype_to_str(dtype))


# Without TensorRT, a dtype of an engine's tensor is torch's.
str_dtype_to_trt = str_dtype_to_torch
trt_dtype_to_str = torch_dtype_to_str


def trt_dtype_to_torch(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself: engines describe their tensors with torch's."""
    return dtype


torch_dtype_to_trt = trt_dtype_to_torch


def torch_to_numpy(x: torch.Tensor) -> np.ndarray:
    """On the host; bfloat16 as ``np_bfloat16``, and whatever has no NumPy dtype as its bytes."""
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np_bfloat16)
    return x.view(torch.int8).numpy() if x.dtype == torch.float8_e4m3fn else x.numpy()


def numpy_to_torch(x: np.ndarray) -> torch.Tensor:
    """The reverse of ``torch_to_numpy``, but for fp8, which comes back as int8."""
    if x.dtype == np_bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def int32_array(x: Any) -> np.ndarray:
    """A NumPy array of int32."""
    return np.array(x, dtype=np.int32)


def fp32_array(x: Any) -> np.ndarray:
    """A NumPy array of float32."""
    return np.array(x, dtype=np.float32)


# -- ranks -------------------------------------------------------------------------------------------------------------


def mpi_world_size() -> int:
    """Ranks of this job: MPI's where mpirun started it, torchrun's where that did, else 1."""
    return _world()[0]


def mpi_rank() -> int:
    """This process's rank in it."""
    return _world()[1]


def local_mpi_rank() -> int:
    """Which process of its machine it is."""
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return mpi_rank()


def mpi_barrier() -> None:
    """Wait for all ranks."""
    if mpi_world_size() == 1:
        return
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        return
    if not started_by_mpi():
        raise ConfigError("mpi_barrier: the ranks have not met yet; load the engine first")
    mpi_comm().Barrier()


def mpi_comm() -> Any:
    """``MPI.COMM_WORLD`` of mpi4py."""
    mpi_world()  # says what is missing
    from mpi4py import MPI

    return MPI.COMM_WORLD


def started_by_mpi() -> bool:
    """Whether mpirun, or something like it, started this process."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"))


def _world() -> tuple[int, int]:
    if started_by_mpi():
        return mpi_world()
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return env_world()[:2]
    return 1, 0


# -- the rest ----------------------------------------------------------------------------------------------------------


def pad_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size."""
    return padded_vocab(vocab_size, tp_size)


def to_json_string(value: Any) -> str:
    """JSON as configs had it: sorted, two spaces, a newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def to_json_file(config: Any, json_file_path: str | os.PathLike[str]) -> None:
    """``to_json_string`` to a file."""
    Path(json_file_path).write_text(to_json_string(config), encoding="utf-8")


def release_gc() -> None:
    """Collect garbage, the GPU's too."""
    gc.collect()
    torch.cuda.empty_cache()
