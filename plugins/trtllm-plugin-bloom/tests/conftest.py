"""Tiny random models, as transformers saves and runs them and as engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from trtllm_core.plugin import Plugins
from trtllm_core.testing.reference import ReferenceModel, reference_models

SMALL = {"vocab_size": 67, "hidden_size": 64, "n_layer": 3, "n_head": 4, "seq_length": 96, "dtype": "float32"}


def config(kind: str, **changes: Any) -> Any:
    return transformers.BloomConfig(**{**SMALL, **changes})


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Callable[..., ReferenceModel]:
    """``tiny(**changes of its config)``, made once each."""
    return reference_models(config, tmp_path_factory.mktemp, plugins, "bloom")
