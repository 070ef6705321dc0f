"""Loading an engine takes the memory of its weights, once: mapped, or packed with the mapping given back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core.checkpoint.hf import HFCheckpoint
from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.plugin import Plugins
from trtllm_core.testing.checkpoints import write_llama

LOADER = """
import json, sys
import psutil, torch
from trtllm_core.cli.bench.timing import peak_memory
from trtllm_core.session import Session
from trtllm_core.plugin import Plugins
from trtllm_core.testing.packed import PackedRows

torch.set_num_threads(1)
plugins = Plugins.load()
plugins.model_families.get("llama").load(), plugins.backends.get("torch").load()
torch.nn.functional.linear(*torch.ones(2, 64, 64).bfloat16())
process = psutil.Process()
before = process.memory_info().rss
session = Session.from_directory(sys.argv[1], plugins=plugins)
loaded = peak_memory()
PackedRows(session, 1).run({0: [1, 2, 3]})
print(json.dumps({"loaded": loaded - before, "used": peak_memory() - before, "weights": session.engine.weight_bytes()}))
"""


class Swollen(HFCheckpoint):
    """A small LLaMA, all of its sizes multiplied; its weights are zeros."""

    factor = 32

    @property
    def config(self) -> Mapping[str, Any]:
        sizes = ("hidden_size", "intermediate_size", "head_dim", "vocab_size")
        return {**super().config, **{name: super(Swollen, self).config[name] * self.factor for name in sizes}}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(size * self.factor for size in super().shape(name))

    def tensor(self, name: str) -> torch.Tensor:
        return torch.zeros(self.shape(name), dtype=torch.bfloat16)


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, plugins: Plugins) -> Iterator[Path]:
    """Somewhat more than half a gigabyte."""
    layers = 36 if request.param == "bfloat16" else 18
    checkpoint = Swollen(write_llama(tmp_path / "hf", num_hidden_layers=layers))
    limits = BuildConfig(dtype=request.param, max_seq_len=64, max_input_len=32, max_batch_size=1)
    build_engine(checkpoint, tmp_path / "engine", limits, plugins=plugins)
    yield tmp_path / "engine"
    shutil.rmtree(tmp_path / "engine")


@pytest.mark.slow
def test_growth(engine: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOADER, str(engine)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] >= 500e6
    assert found["loaded"] <= 1.15 * found["weights"]
    assert found["weights"] * 0.9 <= found["used"] <= 1.15 * found["weights"], "all weights were read"
