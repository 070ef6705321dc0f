"""Which TensorRT there is."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, get_args

from trtllm_core.backends.tensorrt.options import ModuleName
from trtllm_core.errors import BackendError, EngineUnsupportedError

LEAST = {"tensorrt": (11, 1), "tensorrt_rtx": (1, 7)}
"""Oldest versions that have what engines need: KV-cache updates, and attention with lengths and LOWER_RIGHT."""
INSTALL = {
    "tensorrt": "pip install trtllm-core[tensorrt]",
    "tensorrt_rtx": "pip install trtllm-core[tensorrt-rtx]",
}


def installed() -> tuple[ModuleName, ...]:
    """The modules that are installed, without importing them."""
    return tuple(name for name in get_args(ModuleName) if find_spec(name) is not None)


def load_library(wanted: ModuleName | None) -> Any:
    """The module ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        EngineUnsupportedError: it is not installed, or too old.
        BackendError: it is installed, and its libraries cannot be loaded.
    """
    found = installed()
    name = wanted or (found[0] if found else None)
    if name is None:
        raise EngineUnsupportedError(f"no TensorRT is installed: {INSTALL['tensorrt_rtx']}, or {INSTALL['tensorrt']}")
    if name not in found:
        raise EngineUnsupportedError(f"{name} is not installed: {INSTALL[name]}")
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"{name} is installed, but cannot be loaded: {error}") from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if version < LEAST[name]:
        least = ".".join(map(str, LEAST[name]))
        raise EngineUnsupportedError(f"{name} {module.__version__} is too old, {least} is needed: {INSTALL[name]}")
    return module
