"""The classic ``tensorrt_llm``, as far as its Python runtime goes. ``trtllm_core.compat.install()`` names it so."""

from typing import Any

from trtllm_core.compat.tensorrt_llm import bindings, builder, mapping, profiler, quantization, runtime
from trtllm_core.compat.tensorrt_llm._utils import (
    mpi_barrier,
    mpi_rank,
    mpi_world_size,
    str_dtype_to_torch,
    torch_dtype_to_str,
)
from trtllm_core.compat.tensorrt_llm.logger import logger
from trtllm_core.compat.tensorrt_llm.mapping import Mapping
from trtllm_core.version import __version__ as _core_version

__version__ = f"0.10.0+trtllm.core.{_core_version}"
"""The classic release whose runtime this follows, and the trtllm-core that it is of."""

__all__ = [
    "Mapping",
    "__version__",
    "bindings",
    "builder",
    "logger",
    "mapping",
    "mpi_barrier",
    "mpi_rank",
    "mpi_world_size",
    "profiler",
    "quantization",
    "runtime",
    "str_dtype_to_torch",
    "torch_dtype_to_str",
]

_ELSEWHERE = {
    "LLM": "use trtllm_core.ModelRunner",
    "SamplingParams": "use trtllm_core.SamplingConfig",
    "Builder": "engines are made with `trtllm-core build`",
    "BuildConfig": "engines are made with `trtllm-core build`",
    "build": "engines are made with `trtllm-core build`",
    "Network": "model families are written in PyTorch, as plugins",
    "net_guard": "model families are written in PyTorch, as plugins",
    "Module": "model families are written in PyTorch, as plugins",
    "Tensor": "model families are written in PyTorch, as plugins",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise ImportError(f"tensorrt_llm.{name} is not carried on by trtllm-core: {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
