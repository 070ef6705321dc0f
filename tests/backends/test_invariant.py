"""The batch-invariant mode: a row's logits are the same bits, whoever shares its batch and however it is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from trtllm_core.backends.torch.invariant import TILE
from trtllm_core.backends.torch.kernels import invariant_linear, invariant_rows
from trtllm_core.session import Session
from trtllm_core.testing.packed import PackedRows

LENGTHS = (1, 2, 17, TILE, TILE + 1, 70, 100, 140)
# Widths that leave elements over after whole vectors, and few and many heads a group.
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "odd": {
        "hidden_size": 36,
        "intermediate_size": 101,
        "num_attention_heads": 3,
        "head_dim": 12,
        "num_key_value_heads": 1,
    }
    | {"attention_bias": True, "mlp_bias": True, "vocab_size": 131},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 37, "num_key_value_heads": 4},
    "dynamic": {"max_position_embeddings": 80, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


@pytest.fixture(params=MODELS)
def session(request: pytest.FixtureRequest, load: Callable[..., Session]) -> Session:
    return load({"batch_invariant": True}, **MODELS[request.param])


def sequences(session: Session) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(session.config.model.vocab_size) for _ in range(n)] for n in LENGTHS]


def alone(session: Session, ids: list[int]) -> torch.Tensor:
    return PackedRows(session, 1, shuffle=None).run({0: ids})[0]


def test_in_any_company_and_order(session: Session) -> None:
    prompts = sequences(session)
    expected = [alone(session, ids) for ids in prompts]
    for seed in range(3):
        order = random.Random(seed).sample(range(8), 8)
        together = PackedRows(session, 8, shuffle=seed).run({row: prompts[row] for row in order})
        assert all(torch.equal(together[row], expected[row]) for row in range(8))


def test_step_by_step(session: Session) -> None:
    prompts = [ids[:80] for ids in sequences(session)]
    together = PackedRows(session, 8, shuffle=4).steps(dict(enumerate(prompts)))
    assert all(torch.equal(together[row], alone(session, ids)) for row, ids in enumerate(prompts))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_cut_in_any_way(data: st.DataObject, session_of_two: list[tuple[Session, list[list[int]], Any]]) -> None:
    session, prompts, expected = data.draw(st.sampled_from(session_of_two))
    rows = PackedRows(session, 8, shuffle=data.draw(st.integers(0, 9)))
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 40, 63, 64, 65, 140]), min_size=8, max_size=8)
    while (rows.lengths < LENGTHS).any():
        cuts = data.draw(sizes)
        if not any(cuts):  # else a long draw of zeros
            cuts = [150] * 8
        chunks = {row: ids[(at := int(rows.lengths[row])) : at + cuts[row]] for row, ids in enumerate(prompts)}
        chunks = {row: ids for row, ids in chunks.items() if ids}
        for row, logits in rows.run(chunks).items() if chunks else ():
            parts[row].append(logits)
    for row, part in enumerate(parts):
        assert torch.equal(torch.cat(part), expected[row]), f"row {row}"


@pytest.fixture(scope="module")
def session_of_two(load: Callable[..., Session]) -> list[tuple[Session, list[list[int]], Any]]:
    out = []
    for name, block in (("odd", 5), ("window", 16)):
        session = load({"batch_invariant": True}, block, **MODELS[name])
        prompts = sequences(session)
        out.append((session, prompts, [alone(session, ids) for ids in prompts]))
    return out


def test_as_right_as_the_fast_mode(load: Callable[..., Session]) -> None:
    for changes in MODELS.values():
        fast, slow = load(**changes), load({"batch_invariant": True}, **changes)
        assert slow.engine.capabilities.batch_invariant
        assert not fast.engine.capabilities.batch_invariant
        prompts = dict(enumerate(sequences(fast)))
        ours, theirs = PackedRows(slow, 8).run(prompts), PackedRows(fast, 8).run(prompts)
        for row in prompts:
            torch.testing.assert_close(ours[row], theirs[row], rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def varies(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    whole = function(x)
    return any(not torch.equal(function(x[i : i + 1]), whole[i : i + 1]) for i in range(0, len(x), 7))


@pytest.mark.parametrize("width", [1, 7, 44, 333])
@pytest.mark.parametrize(
    "function", [functional.silu, functional.gelu, lambda x: functional.gelu(x, approximate="tanh")]
)
def test_activations(function: Callable[[torch.Tensor], torch.Tensor], width: int, threads: int) -> None:
    x = 3 * torch.randn(400, 2 * width, generator=torch.Generator().manual_seed(0))
    steady = invariant_rows(function)
    assert not varies(steady, x[:, :width].contiguous())
    assert not varies(lambda x: steady(x.chunk(2, -1)[1]), x)
    torch.testing.assert_close(steady(x), function(x))


def test_linear(threads: int) -> None:
    random = torch.Generator().manual_seed(0)
    for inner, outer in ((31, 67), (576, 960), (1536, 576)):
        weight, bias = torch.randn(outer, inner, generator=random), torch.randn(outer, generator=random)
        x = torch.randn(29, inner, generator=random)
        assert not varies(lambda x, w=weight, b=bias: invariant_linear(x, w, b), x)  # type: ignore[misc]
        plain = functional.linear(x, weight, bias)
        torch.testing.assert_close(invariant_linear(x, weight, bias), plain, rtol=1e-4, atol=1e-4)


def test_plain_kernels_do_vary() -> None:
    """What the mode is for: if this fails, PyTorch has become invariant by itself and the mode can go."""
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(960, 576, generator=random), torch.randn(64, 576, generator=random)
    linear = varies(lambda x: functional.linear(x, weight), x)
    assert linear or varies(functional.silu, x[:, :333].contiguous())
