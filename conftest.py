"""For all tests of this repository: the core's and the plugins'."""

from __future__ import annotations

import os

import pytest

# Before torch is imported: threads that wait for each other on cores that other workers use are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["trtllm_core.testing.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, Triton's kernels are interpreted. Triton looks at this when it is first imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU jobs are asked for (``-m cuda``), never the default."""
    if "cuda" in config.getoption("-m"):
        return
    gpu = [item for item in items if item.get_closest_marker("cuda")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
