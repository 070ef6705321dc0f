"""Registers the family. Imports no torch: the family itself is imported when a checkpoint or an engine asks for it."""

from __future__ import annotations

from trtllm_core.plugin import ModelFamilyRegistrar, hookimpl

hook_api = "model_family>=1.0,<2"


@hookimpl
def trtllm_register_model_families(registrar: ModelFamilyRegistrar) -> None:
    """``llama``: LLaMA, Mistral, Qwen2 and 3, Phi-3 and what else shares their module."""
    registrar.add(
        "llama",
        "trtllm_plugin_llama.family:LlamaFamily",
        architectures=(
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Phi3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "gguf:llama",
            "gguf:phi3",
            "gguf:qwen2",
            "gguf:qwen3",
        ),
    )
