"""Registers the family. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import ModelFamilyRegistrar, hookimpl

hook_api = "model_family>=1.0,<2"


@hookimpl
def trtllm_register_model_families(registrar: ModelFamilyRegistrar) -> None:
    """``gemma2``."""
    registrar.add("gemma2", "trtllm_contrib_gemma2.family:Gemma2Family", architectures=("Gemma2ForCausalLM",))
