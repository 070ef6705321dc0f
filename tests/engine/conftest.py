"""A tiny checkpoint, and an engine of it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.plugin import Plugins
from trtllm_core.testing.checkpoints import write_llama


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="session")
def without_llama() -> Plugins:
    """As where trtllm-plugin-llama is not installed."""
    return Plugins.load(entry_points=[e for e in metadata.entry_points(group="trtllm_core") if e.name != "llama"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "hf")


@pytest.fixture
def engine(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> Path:
    build_engine(checkpoint, tmp_path / "engine", BuildConfig(max_seq_len=64, max_input_len=40), plugins=plugins)
    return tmp_path / "engine"
