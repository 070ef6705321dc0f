"""Loading an engine takes the memory of its weights, once: mapped, or packed with the mapping given back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig, RankFile
from trtllm_core.engine.build import plan_engine
from trtllm_core.engine.directory import write_config
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Plugins
from trtllm_core.testing.checkpoints import write_llama

LOADER = """
import json, sys
import psutil, torch
from trtllm_core.cli.measure import peak_memory
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


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, plugins: Plugins) -> Iterator[Path]:
    """Half a gigabyte of zeros, written as the backend writes weights."""
    small = write_llama(tmp_path / "hf")
    limits = BuildConfig(dtype=request.param, max_seq_len=64, max_input_len=32, max_batch_size=1)
    config, family, backend = plan_engine(open_checkpoint(small), limits, plugins)
    model = config.model
    layers = 16 if request.param == "bfloat16" else 8
    sizes = {"hidden_size": 1024, "num_layers": layers, "num_heads": 16, "num_kv_heads": 16, "head_size": 64}
    model = model.replace(**sizes, vocab_size=4096, extras={**model.extras, "intermediate_size": 4096})
    config = config.replace(model=model)
    with torch.device("meta"):
        parameters = list(family.module(model, TensorParallel()).named_parameters())
    directory = tmp_path / "engine"
    directory.mkdir()
    zeros = ((name, torch.zeros(parameter.shape)) for name, parameter in parameters)
    path = backend.build(config, family, zeros, directory, 0, lambda *_: None)
    write_config(directory, config.replace(ranks=(RankFile(name=path.name, bytes=path.stat().st_size),)))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
def test_growth(engine: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOADER, str(engine)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] >= 500e6
    assert found["loaded"] <= 1.15 * found["weights"]
    assert found["weights"] * 0.9 <= found["used"] <= 1.15 * found["weights"], "all weights were read"
