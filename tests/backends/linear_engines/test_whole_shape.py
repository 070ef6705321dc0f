"""The layers of an 8B model, with weights as inputs: what export and build take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("whole_shape.py")
GB = 1_000_000_000


@pytest.mark.parametrize("layers", [2, pytest.param(32, marks=pytest.mark.slow)])
def test_llama_3_8b(layers: int) -> None:
    """Its weights are 16 GB, and neither export nor build reads them."""
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, str(SCRIPT), "llama-3-8b", str(layers)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    assert found["attentions"] == layers
    assert found["weights_bytes"] > 2 * 2 * 128256 * 4096  # embedding and head alone, in bfloat16
    assert found["export_bytes"] < GB
    assert found["peak_bytes"] < 2 * GB
    assert found["plan_bytes"] < 0.05 * GB
