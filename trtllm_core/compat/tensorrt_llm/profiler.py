"""The classic profiler: wall time by tag."""

from __future__ import annotations

import time

from trtllm_core.compat.tensorrt_llm.logger import logger

_started: dict[str, float] = {}
_spent: dict[str, float] = {}


def start(tag: str) -> None:
    """Begin to time a tag."""
    _started[tag] = time.perf_counter()


def stop(tag: str) -> None:
    """Add the time since ``start`` to the tag; a tag that was not started is passed over with a warning."""
    if tag not in _started:
        logger.warning(f"{tag!r} was not started")
        return
    _spent[tag] = _spent.get(tag, 0.0) + time.perf_counter() - _started.pop(tag)


def elapsed_time_in_sec(tag: str) -> float | None:
    """Seconds of a tag; None where it was never stopped."""
    return _spent.get(tag)


def reset() -> None:
    """Forget all tags."""
    _started.clear()
    _spent.clear()


def summary() -> None:
    """Log all tags."""
    for tag, seconds in _spent.items():
        logger.info(f"{tag}: {seconds:.6f} s")
