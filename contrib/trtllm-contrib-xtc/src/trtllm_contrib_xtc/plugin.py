"""Registers XTC. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import LogitsProcessorRegistrar, hookimpl

hook_api = "logits_processor>=1.0,<2"


@hookimpl
def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
    """``xtc``."""
    registrar.add("xtc", "trtllm_contrib_xtc.processor:Xtc")
