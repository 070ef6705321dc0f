"""Registers the family. Imports no torch: the family itself is imported when a checkpoint or an engine asks for it."""

from __future__ import annotations

from trtllm_core.plugin import ModelFamilyRegistrar, hookimpl

hook_api = "model_family>=1.0,<2"


@hookimpl
def trtllm_register_model_families(registrar: ModelFamilyRegistrar) -> None:
    """``gpt``: GPT-2, GPT-J, GPT-NeoX and Pythia."""
    registrar.add(
        "gpt",
        "trtllm_plugin_gpt.family:GPTFamily",
        architectures=(
            "GPT2LMHeadModel",
            "GPTJForCausalLM",
            "GPTNeoXForCausalLM",
            "gguf:gpt2",
            "gguf:gptneox",
        ),
    )
