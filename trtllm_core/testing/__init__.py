"""What tests of trtllm-core and of its plugins share: ``pytest_plugins = ["trtllm_core.testing.plugin"]`` opts in.

The conformance kits are named here, and imported when they are first used: each needs libraries of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_core.testing.family import ModelFamilyConformance

_HOME_OF = {
    "ModelFamilyConformance": "trtllm_core.testing.family",
}

__all__ = ["ModelFamilyConformance"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'trtllm_core.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
