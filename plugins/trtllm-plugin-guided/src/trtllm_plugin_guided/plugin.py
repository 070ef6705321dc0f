"""Registers the processor. Imports neither torch nor llguidance: a request that asks for it does."""

from __future__ import annotations

from trtllm_core.plugin import LogitsProcessorRegistrar, hookimpl

hook_api = "logits_processor>=1.0,<2"


@hookimpl
def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
    """``guided``: JSON schemas, regular expressions and grammars."""
    registrar.add("guided", "trtllm_plugin_guided.processor:Guided")
