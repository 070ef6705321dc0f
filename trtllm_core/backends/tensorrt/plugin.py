"""Registers the TensorRT backend. Imports neither torch nor TensorRT."""

from __future__ import annotations

from trtllm_core.plugin import BackendRegistrar, hookimpl

hook_api = "backend>=1.0,<2"


@hookimpl
def trtllm_register_backends(registrar: BackendRegistrar) -> None:
    """``tensorrt``, for TensorRT and TensorRT-RTX."""
    registrar.add("tensorrt", "trtllm_core.backends.tensorrt.backend:TensorRTBackend")
