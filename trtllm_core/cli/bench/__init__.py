"""``trtllm-core bench``: how fast an engine is here, beside the machine's limit and a peer."""

from __future__ import annotations

from trtllm_core.cli.bench.command import bench

__all__ = ["bench"]
