"""Registers the ONNX Runtime backend. Imports neither torch nor onnxruntime."""

from __future__ import annotations

from trtllm_core.plugin import BackendRegistrar, hookimpl

hook_api = "backend>=1.0,<2"


@hookimpl
def trtllm_register_backends(registrar: BackendRegistrar) -> None:
    """``onnxruntime``."""
    registrar.add("onnxruntime", "trtllm_core.backends.onnxruntime.backend:OnnxRuntimeBackend")
