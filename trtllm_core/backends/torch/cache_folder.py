"""Where a machine keeps what it has compiled and measured."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$TRTLLM_CORE_CACHE``, or a folder in the user's cache directory. It may not be there yet."""
    asked = os.environ.get("TRTLLM_CORE_CACHE")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtllm-core"
