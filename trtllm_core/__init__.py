"""trtllm-core: LLM inference whose every part is a plugin.

Importing this package imports neither torch nor CUDA: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trtllm_core.version import __version__

if TYPE_CHECKING:
    from trtllm_core.config import (
        BuildConfig,
        EngineConfig,
        ExecutorConfig,
        KVCacheConfig,
        Mapping,
        ModelConfig,
        SamplingConfig,
        WorldConfig,
        use,
    )
    from trtllm_core.decoding.request import Delta
    from trtllm_core.decoding.words import to_word_list_format
    from trtllm_core.drafting import accept_equal_drafts, accept_likely_drafts
    from trtllm_core.engine.build import build_engine
    from trtllm_core.errors import TrtllmCoreError
    from trtllm_core.executor import Executor, RequestHandle
    from trtllm_core.generation import GenerationSession
    from trtllm_core.kv_cache.manager import GenerationSequence, KVCacheManager
    from trtllm_core.outputs import GenerationOutput
    from trtllm_core.plugin import Plugins
    from trtllm_core.runner import ModelRunner
    from trtllm_core.session import Session, TensorInfo
    from trtllm_core.standalone import StandaloneDecoder

_HOMES = {
    "trtllm_core.config": (
        "BuildConfig",
        "EngineConfig",
        "ExecutorConfig",
        "KVCacheConfig",
        "Mapping",
        "ModelConfig",
        "SamplingConfig",
        "WorldConfig",
        "use",
    ),
    "trtllm_core.decoding.request": ("Delta",),
    "trtllm_core.decoding.words": ("to_word_list_format",),
    "trtllm_core.drafting": ("accept_equal_drafts", "accept_likely_drafts"),
    "trtllm_core.engine.build": ("build_engine",),
    "trtllm_core.errors": ("TrtllmCoreError",),
    "trtllm_core.executor": ("Executor", "RequestHandle"),
    "trtllm_core.generation": ("GenerationSession",),
    "trtllm_core.kv_cache.manager": ("GenerationSequence", "KVCacheManager"),
    "trtllm_core.outputs": ("GenerationOutput",),
    "trtllm_core.plugin": ("Plugins",),
    "trtllm_core.runner": ("ModelRunner",),
    "trtllm_core.session": ("Session", "TensorInfo"),
    "trtllm_core.standalone": ("StandaloneDecoder",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BuildConfig",
    "Delta",
    "EngineConfig",
    "Executor",
    "ExecutorConfig",
    "GenerationOutput",
    "GenerationSequence",
    "GenerationSession",
    "KVCacheConfig",
    "KVCacheManager",
    "Mapping",
    "ModelConfig",
    "ModelRunner",
    "Plugins",
    "RequestHandle",
    "SamplingConfig",
    "Session",
    "StandaloneDecoder",
    "TensorInfo",
    "TrtllmCoreError",
    "WorldConfig",
    "__version__",
    "accept_equal_drafts",
    "accept_likely_drafts",
    "build_engine",
    "to_word_list_format",
    "use",
]

_CLASSIC = {
    "LogitsProcessor": "HostLogitsProcessor and DeviceLogitsProcessor of trtllm_core.plugin",
    "LogitsProcessorList": "a list of them, passed to generate",
    "StoppingCriteria": "HostStoppingCriterion and DeviceStoppingCriterion of trtllm_core.plugin",
    "StoppingCriteriaList": "a list of them, passed to generate",
    "ModelRunnerCpp": "ModelRunner",
    "decode_words_list": "SamplingConfig.stop_strings",
}
"""Names of the classic runtime that have another counterpart here."""


def __getattr__(name: str) -> Any:
    if name in _CLASSIC:  # no AttributeError: ``from trtllm_core import …`` would put a message of its own in its place
        raise ImportError(
            f"trtllm_core.{name}: here it is {_CLASSIC[name]}; the classic one is in "
            "trtllm_core.compat.tensorrt_llm.runtime"
        )
    if name not in _HOME_OF:
        raise AttributeError(f"module 'trtllm_core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
