"""A stand-in for TensorRT's run-time API that executes an engine's own ONNX graph with ONNX Runtime, in CPU memory.

It is passed where the module ``tensorrt`` or ``tensorrt_rtx`` is, and insists on what those insist on in silence: every
address set, updated caches at the address of the caches, shapes inside the profile that the context has. So all code
between the generation loop and TensorRT runs in tests without a GPU, on the same bytes that an engine is built of. What
it cannot show is what TensorRT itself computes.
"""

from trtllm_core.testing.tensorrt_double.context import Context, RuntimeCache, RuntimeConfig
from trtllm_core.testing.tensorrt_double.engine import Engine, Inspector
from trtllm_core.testing.tensorrt_double.runtime import VERSION, Logger, Runtime, serialise
from trtllm_core.testing.tensorrt_double.types import (
    CudaGraphStrategy,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ExecutionContextAllocationStrategy,
    LayerInformationFormat,
    TensorIOMode,
    bfloat16,
    bool,  # noqa: A004 - as the module names it
    float16,
    float32,
    int8,
    int32,
    int64,
    uint8,
)

__all__ = [
    "Context",
    "CudaGraphStrategy",
    "Engine",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "ExecutionContextAllocationStrategy",
    "Inspector",
    "LayerInformationFormat",
    "Logger",
    "Runtime",
    "RuntimeCache",
    "RuntimeConfig",
    "TensorIOMode",
    "__version__",
    "bfloat16",
    "bool",
    "float16",
    "float32",
    "int8",
    "int32",
    "int64",
    "serialise",
    "uint8",
]

__version__ = VERSION
__name__ = "tensorrt_double"  # what messages call it
