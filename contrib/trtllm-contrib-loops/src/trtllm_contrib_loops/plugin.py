"""Registers the criterion. Imports no torch."""

from __future__ import annotations

from trtllm_core.plugin import StoppingCriterionRegistrar, hookimpl

hook_api = "stopping_criterion>=1.0,<2"


@hookimpl
def trtllm_register_stopping_criteria(registrar: StoppingCriterionRegistrar) -> None:
    """``loop``."""
    registrar.add("loop", "trtllm_contrib_loops.criterion:Loop")
