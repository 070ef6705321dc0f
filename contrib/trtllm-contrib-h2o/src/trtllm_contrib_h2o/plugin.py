"""Registers H2O. Imports neither torch nor NumPy."""

from __future__ import annotations

from trtllm_core.plugin import KVPolicyRegistrar, hookimpl

hook_api = "kv_policy>=1.0,<2"


@hookimpl
def trtllm_register_kv_policies(registrar: KVPolicyRegistrar) -> None:
    """``h2o``."""
    registrar.add("h2o", "trtllm_contrib_h2o.policy:H2OPolicy")
