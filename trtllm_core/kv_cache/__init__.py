"""The KV cache: the block pool, the built-in allocation policies, and the classic ``KVCacheManager`` on top of them.

Names are imported when they are first used, so that discovering the plugin in here imports neither NumPy nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_core.kv_cache.blocks import BlockPool
    from trtllm_core.kv_cache.classic_blocks import Block, BlocksManager
    from trtllm_core.kv_cache.contiguous import ContiguousPolicy
    from trtllm_core.kv_cache.manager import GenerationSequence, KVCacheManager
    from trtllm_core.kv_cache.options import PagedOptions, PrefixOptions
    from trtllm_core.kv_cache.paged import PagedPolicy
    from trtllm_core.kv_cache.prefix import PrefixPolicy

_HOME = {
    "Block": "classic_blocks",
    "BlockPool": "blocks",
    "BlocksManager": "classic_blocks",
    "ContiguousPolicy": "contiguous",
    "GenerationSequence": "manager",
    "KVCacheManager": "manager",
    "PagedOptions": "options",
    "PagedPolicy": "paged",
    "PrefixOptions": "options",
    "PrefixPolicy": "prefix",
}

__all__ = [
    "Block",
    "BlockPool",
    "BlocksManager",
    "ContiguousPolicy",
    "GenerationSequence",
    "KVCacheManager",
    "PagedOptions",
    "PagedPolicy",
    "PrefixOptions",
    "PrefixPolicy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
