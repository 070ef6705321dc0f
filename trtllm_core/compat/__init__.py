"""The import paths and callbacks of other runtimes, as a front to ours.

``install()`` gives the deleted ``tensorrt_llm`` back its name; adapters run logits processors and stopping criteria
that were written for the classic runtime, for transformers or for vLLM. Importing this imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trtllm_core.compat.aliasing import install, uninstall

if TYPE_CHECKING:
    from trtllm_core.compat.classic import (
        ClassicLogitsProcessor,
        ClassicStoppingCriterion,
        LogitsPostProcessors,
        classic_plugins,
    )
    from trtllm_core.compat.hf import TransformersLogitsProcessor, TransformersStoppingCriterion
    from trtllm_core.compat.vllm import VLLMBatchProcessor, VLLMRequestProcessor

_HOMES = {
    "classic": ("ClassicLogitsProcessor", "ClassicStoppingCriterion", "LogitsPostProcessors", "classic_plugins"),
    "hf": ("TransformersLogitsProcessor", "TransformersStoppingCriterion"),
    "vllm": ("VLLMBatchProcessor", "VLLMRequestProcessor"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ClassicLogitsProcessor",
    "ClassicStoppingCriterion",
    "LogitsPostProcessors",
    "TransformersLogitsProcessor",
    "TransformersStoppingCriterion",
    "VLLMBatchProcessor",
    "VLLMRequestProcessor",
    "classic_plugins",
    "install",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
