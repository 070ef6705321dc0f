"""Decode steps as captured graphs: what runs as one, and that it gives what the eager road gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core.backends.torch.batch import is_decode, is_prompt
from trtllm_core.backends.torch.executable import TorchExecutable
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.plugin.kv_policy import KVModel, KVPlan
from trtllm_core.session import Session

pytest.importorskip("triton")

from trtllm_core.backends.torch.cuda import context, tuning
from trtllm_core.backends.torch.cuda.graphs import buckets
from trtllm_core.backends.torch.cuda.kernels.gemv import TILINGS, Tiling
from trtllm_core.backends.torch.cuda.product import Product
from trtllm_core.backends.torch.cuda.tuning import Tunings

BLOCK, WIDTH = 16, 10
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 12},
}


def step(past: list[int], device: str = "cpu", **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of a decode step, with random tokens; row i has the blocks from ``10 i`` on."""
    rows = len(past)
    return {
        "input_ids": torch.randint(0, 60, (rows,)).to(device),
        "position_ids": torch.tensor(past),
        "query_lengths": torch.ones(rows, dtype=torch.int32),
        "past_lengths": torch.tensor(past, dtype=torch.int32),
        "block_tables": torch.arange(rows * WIDTH, dtype=torch.int32).view(rows, WIDTH),
        "logits_indices": torch.arange(rows),
        **more,
    }


def test_buckets() -> None:
    assert buckets(1) == [1]
    assert buckets(8) == [1, 2, 4, 8]
    assert buckets(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]


def test_what_a_graph_runs() -> None:
    assert is_decode(step([3, 4]))
    assert not is_decode(step([3, 4], query_lengths=torch.tensor([2, 0], dtype=torch.int32)))
    assert not is_decode(step([3], query_lengths=torch.tensor([2], dtype=torch.int32), input_ids=torch.zeros(2)))
    assert not is_decode(step([3, 4], lora_ids=torch.tensor([-1, 0], dtype=torch.int32)))
    assert is_decode(step([3, 4], lora_ids=torch.tensor([-1, -1], dtype=torch.int32)))
    assert not is_decode(step([3], virtual_tokens=torch.tensor([0])))


def prompt(length: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of one prompt, whose last token is asked for."""
    return {
        **step([0]),
        "input_ids": torch.randint(0, 60, (length,)),
        "position_ids": torch.arange(length),
        "query_lengths": torch.tensor([length], dtype=torch.int32),
        "logits_indices": torch.tensor([length - 1]),
        **more,
    }


def test_what_a_graph_of_prompts_runs() -> None:
    assert is_prompt(prompt(9), 32)
    assert not is_prompt(prompt(33), 32)
    assert not is_prompt(step([0]), 32), "one token is a step of decoding"
    assert not is_prompt(step([0, 0]), 32)
    assert not is_prompt(prompt(9, past_lengths=torch.tensor([4], dtype=torch.int32)), 32)
    assert not is_prompt(prompt(9, logits_indices=torch.tensor([7])), 32)
    assert not is_prompt(prompt(9, logits_indices=torch.tensor([7, 8])), 32)
    assert not is_prompt(prompt(9, lora_ids=torch.tensor([0], dtype=torch.int32)), 32)


def test_graphs_are_refused_where_there_are_none(load: Callable[..., Session]) -> None:
    with pytest.raises(EngineUnsupportedError, match="cuda_graphs was asked for, but there are none here: the device"):
        load({"cuda_graphs": True})
    assert not load({"cuda_graphs": False}).engine.capabilities.cuda_graphs
    assert not load().engine.capabilities.cuda_graphs


def test_choices_of_kernels_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(
        product: Product, weights: list[torch.Tensor], bias: torch.Tensor | None, rows: int
    ) -> list[int] | None:
        calls.append(product)
        return None if product.gated else [2, 1024, 4, 1]

    monkeypatch.setattr(tuning, "measured", measured)
    monkeypatch.setattr(
        tuning, "_key", lambda product, weight, biased, rows: f"{product} {tuple(weight.shape)} {biased}"
    )
    large, path = torch.empty(1024, 1024), tmp_path / "deep" / "kernels.json"
    first = Tunings(path)
    assert first.choose(Product(), [torch.empty(8, 8)], None) == TILINGS[0], "too small to be measured"
    assert first.choose(Product(), [large], None) == Tiling(2, 1024, 4)
    assert first.choose(Product(gated=True, activation="silu"), [large], None) is None
    first.choose(Product(), [large], None)
    assert len(calls) == 2
    first.save()
    second = Tunings(path)
    assert second.choose(Product(), [large], None) == Tiling(2, 1024, 4)
    assert second.choose(Product(gated=True, activation="silu"), [large], None) is None
    assert len(calls) == 2
    for number, damaged in enumerate(("{", "[]", "null", json.dumps({key: [3] for key in first._known})), 3):
        path.write_text(damaged)
        again = Tunings(path)
        again.choose(Product(), [large], None)
        assert len(calls) == number, "what cannot be read is measured again"
    again.save()
    assert json.loads(path.read_text()) == again._known
    assert len(json.loads(json.dumps(first._known))) == 2


def pair(load: Callable[..., Session], dtype: str, **changes: Any) -> list[TorchExecutable]:
    """The same engine with graphs and without, their caches filled with the same numbers."""
    made = []
    for graphs in (True, False):
        engine = load({"device": "cuda", "cuda_graphs": graphs}, block=BLOCK, torch_dtype=dtype, **changes).engine
        assert isinstance(engine, TorchExecutable)
        assert engine.capabilities.cuda_graphs == graphs
        allocate(engine)
        made.append(engine)
    return made


def allocate(engine: TorchExecutable) -> None:
    model = engine.config.model
    engine.allocate_kv(
        KVPlan(8 * WIDTH, BLOCK, WIDTH, KVModel(model.num_layers, model.num_kv_heads, model.head_size, model.dtype, 0))
    )
    generator = torch.Generator("cuda").manual_seed(0)
    engine._pool.storage.normal_(generator=generator)  # type: ignore[union-attr]


def run(engine: TorchExecutable, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.full((len(inputs["logits_indices"]), engine.config.vocab_size_padded), torch.nan, device="cuda")
    engine.execute(inputs, {"logits": out}, 0)
    return out


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 4e-2)])
def test_a_graph_gives_what_the_eager_road_gives(
    load: Callable[..., Session], name: str, dtype: str, tolerance: float
) -> None:
    ours, plain = pair(load, dtype, **MODELS[name])
    for past in ([5], [0], [17, 3, 100], [15, 16, 31, 32, 158], [1] * 8, [9, 9]):
        inputs = step(past)
        a, b = run(ours, inputs), run(plain, inputs)
        assert (a - b).norm() / b.norm() < tolerance
        kept, expected = (engine._pool.storage for engine in (ours, plain))  # type: ignore[union-attr]
        assert (kept - expected).norm() / expected.norm() < 1e-2
    assert ours._graphs is not None
    assert ours._graphs.decode.captured == 4  # for 1, 2, 4 and 8 rows
    inputs = step([4, 5, 6], logits_indices=torch.tensor([2, 0]))
    some, there = run(ours, inputs), run(ours, inputs | {"input_ids": inputs["input_ids"].cuda()})
    assert torch.equal(some, there)
    assert (some - run(plain, inputs)).norm() / some.norm() < tolerance


@pytest.mark.cuda
def test_in_steady_state_nothing_is_allocated_and_nobody_waits(load: Callable[..., Session]) -> None:
    ours, _ = pair(load, "bfloat16")
    inputs = step([17, 3, 100])
    outputs = {"logits": torch.empty(3, ours.config.vocab_size_padded, device="cuda")}
    ours.execute(inputs, outputs, 0)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            ours.execute(inputs, outputs, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.cuda
def test_another_pool_gets_other_graphs(load: Callable[..., Session]) -> None:
    ours, plain = pair(load, "float32")
    inputs = step([17, 3])
    run(ours, inputs)
    allocate(ours)
    assert ours._graphs is not None
    assert ours._graphs.decode.captured == 0
    allocate(plain)
    assert (run(ours, inputs) - run(plain, inputs)).abs().max() < 1e-3
    assert ours._graphs.decode.captured == 1


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_a_graph_gives_what_the_eager_road_gives(load: Callable[..., Session], name: str) -> None:
    ours, plain = pair(load, "bfloat16", **MODELS[name])
    for length in (2, 31, 32, 100, 160):
        inputs = prompt(length)
        a, b = run(ours, inputs), run(plain, inputs)
        assert (a - b).norm() / b.norm() < 4e-2
        kept, expected = (engine._pool.storage for engine in (ours, plain))  # type: ignore[union-attr]
        assert (kept - expected).norm() / expected.norm() < 1e-2
        assert not (kept - expected)[:, 160:].any(), "nothing is written beyond the prompt's blocks"
    assert ours._graphs is not None
    assert ours._graphs.prompts is not None
    assert ours._graphs.prompts.captured == 3  # of 32, 128 and 192 tokens
    assert pair(load, "float32")[0]._graphs.prompts is None  # type: ignore[union-attr]


def packed(lengths: list[int], past: list[int]) -> dict[str, torch.Tensor]:
    """Inputs of prompts and rows that decode, together in one call; the last token of each is asked for."""
    rows = zip(past, lengths, strict=True)
    return {
        **step(past),
        "input_ids": torch.randint(0, 60, (sum(lengths),)),
        "position_ids": torch.cat([torch.arange(p, p + n) for p, n in rows]),
        "query_lengths": torch.tensor(lengths, dtype=torch.int32),
        "logits_indices": torch.tensor(lengths).cumsum(0) - 1,
    }


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 4e-2)])
def test_a_large_call_by_kernels_gives_what_it_gives_without(
    load: Callable[..., Session], monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, tolerance: float
) -> None:
    monkeypatch.setattr(context, "FUSED_FROM", 1)
    ours, plain = pair(load, dtype, **MODELS[name])
    assert ours._fused_from == 1
    for lengths, past in (([20, 5, 33], [0, 0, 0]), ([1, 40, 1, 7], [17, 0, 3, 20])):
        inputs = packed(lengths, past)
        a, b = run(ours, inputs), run(plain, inputs)
        assert (a - b).norm() / b.norm() < tolerance
        kept, expected = (engine._pool.storage for engine in (ours, plain))  # type: ignore[union-attr]
        assert (kept - expected).norm() / expected.norm() < 1e-2
    assert not ours._switch.on
