"""What TensorRT says of a plan before it reads it."""

from __future__ import annotations

from typing import Any

CAUSES = {
    "VERSION_MISMATCH": "it is of another version",
    "UNSUPPORTED_CC": "it is for GPUs of another compute capability",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU's memory does not suffice",
    "MALFORMED_ENGINE": "it is damaged or truncated",
    "CUDA_ERROR": "CUDA reports an error, or there is no driver",
}


def validity_problem(trt: Any, runtime: Any, plan: Any) -> str | None:
    """Why a plan cannot run on this machine; None where nothing is said against it, or nothing can be asked.

    ``get_engine_validity`` is tensorrt_rtx's alone: a plan of ``tensorrt`` is known by its recorded version.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return None
    flags = trt.EngineInvalidityDiagnostics
    causes = [text for name, text in CAUSES.items() if hasattr(flags, name) and int(diagnostics) & _bit(flags, name)]
    why = ", and ".join(causes) or f"diagnostics {int(diagnostics)}"
    return f"{trt.__name__} {trt.__version__} cannot run this engine on this machine: {why}"


def _bit(flags: Any, name: str) -> int:
    member = getattr(flags, name)
    return int(getattr(member, "value", member))
