"""Registers the family. Imports no torch: the family itself is imported when a checkpoint or an engine asks for it."""

from __future__ import annotations

from trtllm_core.plugin import ModelFamilyRegistrar, hookimpl

hook_api = "model_family>=1.0,<2"


@hookimpl
def trtllm_register_model_families(registrar: ModelFamilyRegistrar) -> None:
    """``bloom``: BLOOM and BLOOMZ."""
    registrar.add("bloom", "trtllm_plugin_bloom.family:BloomFamily", architectures=("BloomForCausalLM", "gguf:bloom"))
