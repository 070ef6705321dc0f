"""Types and enumerations of TensorRT's run-time API."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

float32, float16, bfloat16, int64, int32, int8, uint8 = (
    np.dtype(name) for name in ("float32", "float16", "V2", "int64", "int32", "int8", "uint8")
)
bool = np.dtype("bool")  # noqa: A001 - as the module names it
OF_ONNX: dict[str, np.dtype[Any]] = {
    "tensor(float)": float32,
    "tensor(float16)": float16,
    "tensor(int64)": int64,
    "tensor(int32)": int32,
}
"""By ONNX Runtime's names."""

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class TensorIOMode(enum.Enum):
    """Whether a tensor is an input or an output."""

    INPUT = 1
    OUTPUT = 2


class EngineValidity(enum.Enum):
    """What ``Runtime.get_engine_validity`` answers."""

    VALID = 0
    INVALID = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    """Who gives a context its memory."""

    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class EngineInvalidityDiagnostics(enum.IntFlag):
    """Why an engine is invalid."""

    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class CudaGraphStrategy(enum.Enum):
    """As tensorrt_rtx has it."""

    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class LayerInformationFormat(enum.Enum):
    """How the inspector answers."""

    JSON = 1
