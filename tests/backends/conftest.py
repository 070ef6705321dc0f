"""Tiny engines for the torch backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(max_batch_size=8, max_input_len=150, max_seq_len=160, max_num_tokens=1024, tokens_per_block=16)


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Callable[..., Session]:
    """``load(options of the backend, tokens per block, **fields of config.json)``: a tiny LLaMA, built once each."""
    built: dict[str, Path] = {}

    def make(options: dict[str, Any] | None = None, block: int = 16, **changes: Any) -> Session:
        key = f"{block} {sorted(changes.items())}"
        if key not in built:
            folder = tmp_path_factory.mktemp("engine")
            limits = LIMITS.replace(tokens_per_block=block)
            build_engine(write_llama(folder / "hf", **changes), folder / "engine", limits, plugins=plugins)
            built[key] = folder / "engine"
        return Session.from_directory(built[key], plugins=plugins, **(options or {}))

    return make
