"""The classic KV cache manager, under its old path."""

from trtllm_core.kv_cache.classic_blocks import Block, BlocksManager
from trtllm_core.kv_cache.manager import GenerationSequence, KVCacheManager

__all__ = ["Block", "BlocksManager", "GenerationSequence", "KVCacheManager"]
