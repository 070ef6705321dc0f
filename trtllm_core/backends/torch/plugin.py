"""Registers the torch backend, by the road that every plugin takes. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import BackendRegistrar, hookimpl

hook_api = "backend>=1.0,<2"


@hookimpl
def trtllm_register_backends(registrar: BackendRegistrar) -> None:
    """``torch``."""
    registrar.add("torch", "trtllm_core.backends.torch.backend:TorchBackend")
