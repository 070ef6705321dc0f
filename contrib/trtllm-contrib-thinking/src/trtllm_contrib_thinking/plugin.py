"""Registers the budget. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import LogitsProcessorRegistrar, hookimpl

hook_api = "logits_processor>=1.0,<2"


@hookimpl
def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
    """``thinking_budget``."""
    registrar.add("thinking_budget", "trtllm_contrib_thinking.budget:ThinkingBudget")
