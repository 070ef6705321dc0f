"""What tensorrt_rtx compiled for this GPU, kept beside the engine."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any


class KernelCache:
    """An ``IRuntimeCache`` that is read when the engine is loaded, and written when it is closed.

    Kernels are compiled while the engine runs, so only its end knows all of them.

    Args:
        config: ``IRuntimeConfig`` of tensorrt_rtx.
        path: where it is kept.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self.content = config.create_runtime_cache()
        self._path = path
        if path.is_file():
            self.content.deserialize(path.read_bytes())  # one of another GPU or version is refused: a cold start
        self.save = weakref.finalize(self, _write, self.content, path)
        """Write it now, rather than when it is no longer used or Python ends. Once."""


def _write(content: Any, path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_bytes(bytes(content.serialize()))
        scratch.replace(path)
    except OSError:  # a directory that cannot be written to: the next start compiles again
        scratch.unlink(missing_ok=True)
