"""What tests of trtllm-core and of its plugins share: ``pytest_plugins = ["trtllm_core.testing.plugin"]`` opts in.

The conformance kits are named here, and imported when they are first used: each needs libraries of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_core.testing.backends import BackendConformance
    from trtllm_core.testing.criteria import StoppingCriterionConformance
    from trtllm_core.testing.family import ModelFamilyConformance
    from trtllm_core.testing.kit import Conformance, Result, run_kit
    from trtllm_core.testing.kv_policy import KVPolicyConformance
    from trtllm_core.testing.observers import ObserverConformance
    from trtllm_core.testing.processors import LogitsProcessorConformance
    from trtllm_core.testing.samplers import DecoderConformance

_HOME_OF = {
    "BackendConformance": "trtllm_core.testing.backends",
    "Conformance": "trtllm_core.testing.kit",
    "DecoderConformance": "trtllm_core.testing.samplers",
    "KVPolicyConformance": "trtllm_core.testing.kv_policy",
    "LogitsProcessorConformance": "trtllm_core.testing.processors",
    "ModelFamilyConformance": "trtllm_core.testing.family",
    "ObserverConformance": "trtllm_core.testing.observers",
    "Result": "trtllm_core.testing.kit",
    "StoppingCriterionConformance": "trtllm_core.testing.criteria",
    "run_kit": "trtllm_core.testing.kit",
}

__all__ = [
    "BackendConformance",
    "Conformance",
    "DecoderConformance",
    "KVPolicyConformance",
    "LogitsProcessorConformance",
    "ModelFamilyConformance",
    "ObserverConformance",
    "Result",
    "StoppingCriterionConformance",
    "run_kit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'trtllm_core.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
