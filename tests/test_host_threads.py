"""PyTorch's threads beside those of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig, build_engine
from trtllm_core.host_threads import FEW, few_threads
from trtllm_core.testing.checkpoints import write_llama


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("apart", "elements", "threads"), [(True, FEW, 1), (True, FEW + 1, 2), (False, 1, 2)], ids=["few", "many", "shared"]
)
def test_how_many_there_are(apart: bool, elements: int, threads: int) -> None:
    with few_threads(apart, elements):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("backend", "threads"), [("onnxruntime", 1), ("torch", 2)])
def test_the_choice_beside_an_engine(backend: Any, threads: int, tmp_path: Path) -> None:
    limits = BuildConfig(max_batch_size=2, max_input_len=8, max_seq_len=16, dtype="float32", backend=backend)
    build_engine(write_llama(tmp_path / "hf"), tmp_path / "engine", limits)
    with ModelRunner.from_dir(tmp_path / "engine") as runner:
        loop: Any = runner.generation.loop
        ask, seen = loop._ask, []
        loop._ask = lambda *given: (seen.append(torch.get_num_threads()), ask(*given))[1]
        runner.generate([[5, 6]], SamplingConfig(max_new_tokens=3, end_id=()))
    assert seen == [threads] * 3
    assert torch.get_num_threads() == 2
