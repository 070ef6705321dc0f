"""The built-in KV policies as a plugin. Imports neither torch nor NumPy: factories are named, not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_core.plugin.markers import hookimpl

if TYPE_CHECKING:
    from trtllm_core.plugin.registrar import KVPolicyRegistrar

hook_api = "kv_policy>=1.0,<2"


@hookimpl
def trtllm_register_kv_policies(registrar: KVPolicyRegistrar) -> None:
    """Register ``paged`` (the default), ``prefix`` and ``contiguous``."""
    registrar.add("paged", "trtllm_core.kv_cache.paged:PagedPolicy")
    registrar.add("prefix", "trtllm_core.kv_cache.prefix:PrefixPolicy")
    registrar.add("contiguous", "trtllm_core.kv_cache.contiguous:ContiguousPolicy")
