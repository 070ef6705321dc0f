"""Registers StreamingLLM. Imports neither torch nor NumPy."""

from __future__ import annotations

from trtllm_core.plugin import KVPolicyRegistrar, hookimpl

hook_api = "kv_policy>=1.0,<2"


@hookimpl
def trtllm_register_kv_policies(registrar: KVPolicyRegistrar) -> None:
    """``streaming_llm``."""
    registrar.add("streaming_llm", "trtllm_contrib_streaming_llm.policy:StreamingPolicy")
