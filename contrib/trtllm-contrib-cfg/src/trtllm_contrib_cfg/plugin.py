"""Registers classifier-free guidance. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import LogitsProcessorRegistrar, hookimpl

hook_api = "logits_processor>=1.0,<2"


@hookimpl
def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
    """``cfg``."""
    registrar.add("cfg", "trtllm_contrib_cfg.processor:Guidance")
