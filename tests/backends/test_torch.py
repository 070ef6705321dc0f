"""The torch backend: its pool, its block tables, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core.backends.torch.kernels import widened_linear
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.backends.torch.watching import LayerWatch
from trtllm_core.config import BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.errors import BackendError, ConfigError, EngineUnsupportedError
from trtllm_core.nn import Layer
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Plugins
from trtllm_core.plugin.kv_policy import Edits, KVPlan
from trtllm_core.session import Session
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.packed import PackedRows, kv_plan, prefill_and_decode

Load = Callable[..., Session]


def tokens(*counts: int, vocab: int = 67) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(vocab) for _ in range(count)] for count in counts]


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Block tables


@pytest.mark.parametrize("changes", [{}, {"architectures": ["MistralForCausalLM"], "sliding_window": 21}])
def test_scattered_blocks_answer_like_neighbours(changes: dict[str, Any], load: Load) -> None:
    session, prompts = load(**changes), tokens(70, 3, 33, 50)
    neighbours = prefill_and_decode(session, prompts, 2, shuffle=None)
    for seed in range(3):
        close(prefill_and_decode(session, prompts, 2, shuffle=seed), neighbours)


def test_a_row_alone_in_scattered_blocks(load: Load) -> None:
    """One row takes other roads than several: a slice of the pool, or a gather; with and without a past."""
    session, (ids,) = load(), tokens(70)
    whole = PackedRows(session, 1, shuffle=None).run({0: ids})[0]
    for shuffle in (None, 1, 2):
        rows = PackedRows(session, 1, shuffle)
        parts = [rows.run({0: ids[:40]})[0], rows.run({0: ids[40:41]})[0], rows.run({0: ids[41:70]})[0]]
        close([torch.cat(parts)], [whole])


def test_a_wrong_table_shows(load: Load) -> None:
    session, (ids,) = load(), tokens(70)
    rows = PackedRows(session, 1, shuffle=None)
    rows.run({0: ids[:69]})
    rows.blocks[0, 1] = rows.blocks[0, 0]
    wrong = rows.run({0: ids[69:]})[0]
    assert (wrong - PackedRows(session, 1).run({0: ids})[0][69:]).abs().max() > 0.1


def test_what_lies_behind_a_row_is_never_seen(load: Load) -> None:
    """Not the rest of its last block, and not blocks of others: huge numbers there change nothing."""
    session, prompts = load(), tokens(9, 30)
    expected = prefill_and_decode(session, prompts, 4)
    rows = PackedRows(session, 2)
    session.engine._pool.storage.fill_(1e4)  # type: ignore[attr-defined]
    first = rows.run({row: ids[:-4] for row, ids in enumerate(prompts)})
    later = rows.steps({row: ids[-4:] for row, ids in enumerate(prompts)})
    close([torch.cat((first[row], later[row])) for row in first], expected)


# The pool


def pool(plan: KVPlan) -> KVPool:
    pool = KVPool(plan, torch.float32, torch.device("cpu"))
    pool.storage.copy_(torch.arange(plan.num_blocks).repeat_interleave(plan.tokens_per_block)[:, None, None])
    return pool


def content(pool: KVPool) -> list[int]:
    blocks = pool.storage.unflatten(1, (pool.plan.num_blocks, -1))
    assert (blocks == blocks[:1, :, :1, :1, :1]).all()  # alike in all layers, entries, heads, keys and values
    return [int(x) for x in blocks[0, :, 0, 0, 0]]


@pytest.mark.parametrize(
    ("copies", "after"),
    [
        (((0, 3),), [0, 1, 2, 0, 4, 5]),
        (((0, 1), (1, 0)), [1, 0, 2, 3, 4, 5]),
        (((0, 1), (1, 2), (2, 0)), [2, 0, 1, 3, 4, 5]),
        (((4, 0), (4, 1), (0, 4)), [4, 4, 2, 3, 0, 5]),
        ((), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_copies_are_simultaneous(copies: tuple[tuple[int, int], ...], after: list[int], load: Load) -> None:
    made = pool(kv_plan(load().config, 6))
    made.edit(Edits(copies=copies))
    assert content(made) == after


def test_a_copied_sequence_goes_on(load: Load) -> None:
    """A fork within a block: the copy answers as the original does, and writes only to itself."""
    session, (ids,) = load(), tokens(50)
    rows = PackedRows(session, 2)
    rows.run({0: ids[:27]})
    session.engine.edit_kv(
        Edits(copies=tuple(zip(rows.blocks[0, :2].tolist(), rows.blocks[1, :2].tolist(), strict=True)))
    )
    rows.lengths[1] = 27
    other = [(token + 1) % 67 for token in ids[27:]]
    expected = PackedRows(load(), 2).run({0: ids, 1: ids[:27] + other})  # a second session: its own pool
    parts = [rows.run({1: other[i : i + 1], 0: ids[27 + i : 28 + i]}) for i in range(23)]
    close(
        [torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])],
        [expected[0][27:], expected[1][27:]],
    )


def test_allocated_twice(load: Load) -> None:
    session, prompts = load(), tokens(20, 30)
    expected = prefill_and_decode(session, prompts, 2)
    small, large = kv_plan(session.config, 3), kv_plan(session.config, 30)
    assert session.engine.allocate_kv(large) == large.bytes
    assert session.engine.allocate_kv(small) == small.bytes
    assert session.engine._pool.storage.count_nonzero() == 0  # type: ignore[attr-defined]
    close(prefill_and_decode(session, prompts, 2), expected)


def test_before_there_is_a_pool(load: Load) -> None:
    session = load()
    rows = PackedRows(session, 1)
    inputs = rows.inputs({0: [1, 2]})
    fresh = load()
    with pytest.raises(BackendError, match="no KV cache yet: call allocate_kv"):
        fresh.run(inputs, {"logits": torch.empty(2, 67)})
    with pytest.raises(BackendError, match="no KV cache yet"):
        fresh.engine.edit_kv(Edits(copies=((0, 1),)))


def test_what_the_kv_cache_can_do(load: Load) -> None:
    def offered(**changes: Any) -> tuple[set[str], int | None]:
        found = load(changes.pop("options", None), **changes).engine.capabilities
        return set(found.kv), found.attention_window

    everything = {"window", "positions", "moves", "attention_scores", "host"}
    assert offered() == (everything, None)
    assert offered(options={"batch_invariant": True}) == (everything - {"attention_scores"}, None)
    window = {"architectures": ["MistralForCausalLM"], "sliding_window": 37}
    assert offered(**window) == (everything - {"moves"}, 37)
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 80}
    assert offered(**dynamic) == (everything - {"positions"}, None)


def test_no_scores_of_rings(load: Load) -> None:
    plan = replace(kv_plan(load().config, 4), window=32, scores=True)
    with pytest.raises(BackendError, match="no attention scores of cyclic caches"):
        load().engine.allocate_kv(plan)


def test_entries_move(load: Load) -> None:
    """In all layers or in one, all at the same time."""
    engine = load().engine
    engine.allocate_kv(kv_plan(engine.config, 2))
    storage = engine._pool.storage
    storage.copy_(torch.arange(storage[..., 0, 0].numel()).view(2, -1, 1, 1).expand_as(storage))
    layers, entries = storage[:, :, 0, 0].clone().unbind(0)
    moves = ((3, 4, -1), (4, 3, -1), (20, 0, 1), (0, 1, 1), (9, 20, 0))
    engine.move_kv(*np.array(moves).T)
    first, second = layers.clone(), entries.clone()
    first[[4, 3, 20]] = layers[[3, 4, 9]]
    second[[4, 3, 0, 1]] = entries[[3, 4, 20, 0]]
    assert torch.equal(storage, torch.stack((first, second))[..., None, None].expand_as(storage))


# Options


def test_refusals(load: Load, tmp_path: Path, plugins: Plugins) -> None:
    load()
    if not torch.cuda.is_available():
        with pytest.raises(EngineUnsupportedError, match="finds no CUDA GPU; use device='cpu'"):
            load({"device": "cuda"})
    with pytest.raises(ConfigError, match="torch backend has no option 'devices'"):
        load({"devices": "cpu"})
    half = write_llama(tmp_path / "hf", dtype=torch.bfloat16)
    build_engine(half, tmp_path / "engine", plugins=plugins)
    with pytest.raises(EngineUnsupportedError, match="float32 engines on the CPU; this engine is bfloat16 on cpu"):
        Session.from_directory(tmp_path / "engine", plugins=plugins, batch_invariant=True)
    with pytest.raises(ConfigError, match="rank 0 of 1, but parallel says rank 1 of 2"):
        load({"parallel": TensorParallel(1, 2)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"options": {"fast": True}}, "torch backend has no build option 'fast'"),
        ({"kv_dtype": "float16"}, "keys and values as fp8, int8 codes, or in the engine's dtype, float32"),
    ],
)
def test_builds_that_it_refuses(build: dict[str, Any], message: str, tmp_path: Path, plugins: Plugins) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(write_llama(tmp_path / "hf"), tmp_path / "engine", BuildConfig(**build), plugins=plugins)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("rows", [1, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_linear(rows: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=random).to(dtype) for shape in ((rows, 64), (48, 64), (48,)))
    exact = x.double() @ weight.double().T + bias.double()
    for b, expected in ((bias, exact), (None, exact - bias.double())):
        out = widened_linear(x, weight, b)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=0.1)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_cuda_answers_like_the_cpu(dtype: torch.dtype, tolerance: float, tmp_path: Path, plugins: Plugins) -> None:
    """On the same weights; needs no transformers."""
    rounded = write_llama(tmp_path / "hf", dtype=dtype)
    engines, prompts = {}, tokens(60, 5, 33)
    for kind in ("float32", str(dtype).removeprefix("torch.")):
        build_engine(
            rounded, tmp_path / kind, BuildConfig(dtype=kind, max_seq_len=128, max_input_len=100), plugins=plugins
        )
        engines[kind] = tmp_path / kind
    exact = prefill_and_decode(Session.from_directory(engines["float32"], plugins=plugins), prompts, 4)
    cuda = Session.from_directory(tmp_path / str(dtype).removeprefix("torch."), plugins=plugins, device="cuda")
    for shuffle in (None, 1):
        ours = prefill_and_decode(cuda, prompts, 4, shuffle)
        largest = max(logits.abs().max() for logits in exact)
        assert max((a - b).abs().max() for a, b in zip(ours, exact, strict=True)) < tolerance * largest
    made = KVPool(kv_plan(cuda.config, 6), torch.float32, torch.device("cuda"))
    made.storage.copy_(torch.from_numpy(np.arange(6).repeat(64))[:, None, None])
    made.edit(Edits(copies=((0, 1), (1, 0))))
    assert content(made) == [1, 0, 2, 3, 4, 5]


def test_what_is_watched_stays_when_the_next_layer_writes_over_it() -> None:
    class Doubles(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    class Chain(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Doubles(), Doubles()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    chain = Chain()
    watch = LayerWatch(chain)
    chain(torch.ones(1))
    assert {name: value.item() for name, value in watch.found.items()} == {"layers.0": 2, "layers.1": 4}
    watch.end()
    assert not any("forward" in vars(layer) for layer in chain.layers)
