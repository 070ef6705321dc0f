"""Attention over codes: the formula over rounded keys and values, whatever computes it and however rows are cut."""

from __future__ import annotations

import pytest
import torch

from tests.backends.formula import (
    BLOCK,
    CUTS,
    LAYERS,
    LENGTHS,
    LONGEST,
    RINGS,
    WITHIN,
    Context,
    Rows,
    compiled_context,
    layer,
    off,
    streaming,
)
from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.invariant import InvariantContext
from trtllm_core.backends.torch.layer_cache import CODES, dequantize, quantize
from trtllm_core.backends.torch.plain import PlainContext
from trtllm_core.nn import Attention, rotate_
from trtllm_core.plugin.kv_policy import Edits

KINDS = ["fp8", "int8"]
CONTEXTS = [PagedContext, InvariantContext, PlainContext, compiled_context]
NAMES = ["plain", "partial", "alibi, one kv head", "all"]


def rounded(x: torch.Tensor, kv: str) -> torch.Tensor:
    """``[n, heads, d]``: what is kept of it, said once more in float64."""
    most = x.abs().amax(-1, keepdim=True)
    if kv == "int8":
        return torch.round(x / (most / 127)) * (most / 127)
    ratio = x / (most / 448)
    step = 2.0 ** (torch.floor(torch.log2(ratio.abs().clamp(min=2.0**-6))) - 3)
    return torch.round(ratio / step) * step * (most / 448)


def kept(attention: Attention, qkv: torch.Tensor, kv: str) -> torch.Tensor:
    """``qkv`` with keys and values as the cache keeps them, keys turned back."""
    heads, turned = attention.num_heads, qkv.double().clone()
    positions = torch.arange(len(qkv))
    if attention.rotary is not None:
        rotate_(turned, heads + attention.num_kv_heads, *(x.double() for x in attention.rotary(positions)))
    turned[:, heads:] = rounded(turned[:, heads:], kv)
    if attention.rotary is not None:
        cos, sin = (x.double() for x in attention.rotary(positions))
        rotate_(turned, heads + attention.num_kv_heads, cos, -sin)
    return turned


def formula(rows: Rows, kv: str | None) -> list[torch.Tensor]:
    whole, rows.qkv = rows.qkv, [x.double() if kv is None else kept(rows.layer, x, kv) for x in rows.qkv]
    try:
        return rows.expected()
    finally:
        rows.qkv = whole


@pytest.mark.parametrize("kv", KINDS)
def test_codes_are_the_nearest(kv: str) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(500, 3, 40, generator=random) * 10.0 ** torch.randint(-9, 9, (500, 3, 1), generator=random)
    codes, scales = quantize(values, CODES[kv])
    found = dequantize(codes, scales, torch.float64)
    torch.testing.assert_close(found, rounded(values.double(), kv), rtol=1e-6, atol=0)
    most = values.abs().amax(-1, keepdim=True)
    error = (found - values).abs()
    assert (error <= most / 253).all() if kv == "int8" else (error <= values.abs() / 15.9 + most / 448 / 2**10).all()
    again, _ = quantize(found.float(), CODES[kv])
    assert (again.float() - codes.float()).abs().max() == 0, "what was kept is kept again"


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_formula(name: str, cut: str, context: Context, kv: str) -> None:
    rows = Rows(layer(**LAYERS[name]), LENGTHS, kv=kv)
    out = rows.cut(CUTS[cut], context)
    # A few keys lie half-way between two codes and may become either.
    expected = formula(rows, kv)
    assert off(out, expected) < (1e-2 if kv == "int8" else 5e-2)
    assert torch.cat([(a - b).abs() for a, b in zip(out, expected, strict=True)]).mean() < 5e-5
    exact = torch.cat(formula(rows, None))
    error = ((torch.cat(out) - exact).norm() / exact.norm()).item()
    assert 2e-3 < error < (0.02 if kv == "int8" else 0.1), "what the codes cost"


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("ring", RINGS)
def test_rings(ring: str, kv: str) -> None:
    expected = formula(Rows(layer(**LAYERS["all"]), LENGTHS, ring=RINGS[ring], kv=kv), kv)
    for context in (PagedContext, InvariantContext, PlainContext):
        for cut in CUTS.values():
            rows = Rows(layer(**LAYERS["all"]), LENGTHS, ring=RINGS[ring], kv=kv)
            assert off(rows.cut(cut, context), expected) < 5e-2


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("context", [PlainContext, InvariantContext])
@pytest.mark.parametrize("ring", [(24, 4), (None, 0)])
def test_positions_within_the_cache(ring: tuple[int | None, int], context: Context, kv: str) -> None:
    """Keys are kept before they are rotated."""
    rows = Rows(layer(**WITHIN["rotary"]), LENGTHS, ring=ring, positions="cache", kv=kv)
    qkv = [torch.cat((x[:, :4].double(), rounded(x[:, 4:].double(), kv)), 1) for x in rows.qkv]
    expected = [streaming(rows.layer, x, rows.plan).float() for x in qkv]
    assert off(rows.cut(CUTS["ragged"], context), expected) < 2e-5


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ring", [(None, 0), (24, 4)])
def test_the_same_bits_however_rows_are_cut(ring: tuple[int | None, int], name: str, kv: str) -> None:
    whole = Rows(layer(**LAYERS[name]), LENGTHS, ring=ring, kv=kv).cut(CUTS["whole"], InvariantContext)
    for cut in CUTS.values():
        parts = Rows(layer(**LAYERS[name]), LENGTHS, ring=ring, kv=kv).cut(cut, InvariantContext)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("kv", KINDS)
def test_blocks_are_copied_and_entries_moved_with_their_scales(kv: str) -> None:
    rows = Rows(layer(), (70, 70), kv=kv)
    pool = rows.pool
    assert pool.scales is not None
    rows.run({0: 70}, PagedContext)
    before = pool.layers[0].blocks(torch.arange(pool.plan.num_blocks))
    first, second = rows.blocks[0, :2].tolist()
    pool.edit(Edits(copies=((first, second), (second, first))))
    source, target = torch.tensor([first, second]) * BLOCK + 3, torch.tensor([second, first]) * BLOCK + 5
    pool.move(source, target, torch.tensor([-1, 0]))
    expected = before.unflatten(0, (-1, BLOCK)).clone()
    expected[[first, second]] = expected[[second, first]]
    expected = expected.flatten(0, 1)
    expected[target] = expected[source]
    after = pool.layers[0].blocks(torch.arange(pool.plan.num_blocks))
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kv", KINDS)
def test_a_pool_is_as_large_as_its_plan_says(kv: str) -> None:
    rows = Rows(layer(size=64), (9,), kv=kv)
    plan = rows.plan
    assert rows.pool.bytes == plan.num_blocks * BLOCK * 2 * 2 * (64 + 4)


@pytest.mark.cuda
@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 7e-2), (torch.float16, 7e-2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_cuda(name: str, dtype: torch.dtype, tolerance: float, mixed: bool, kv: str) -> None:
    device, context = torch.device("cuda"), PagedContext
    if mixed:
        context = pytest.importorskip("trtllm_core.backends.torch.cuda.context").MixedContext
    for options in ({}, {"ring": (24, 4)}) if not mixed else ({},):
        for cut in CUTS.values():
            rows = Rows(layer(**LAYERS[name]), LENGTHS, dtype, device=device, kv=kv, **options)
            expected = formula(rows, kv)
            if rows.layer.rotary is not None:
                rows.layer.rotary.prepare(LONGEST, device, dtype)
            if rows.layer.alibi is not None:
                rows.layer.alibi.prepare(device)
            largest = max(x.abs().max().item() for x in rows.qkv)
            assert off(rows.cut(cut, context), expected) < tolerance * largest
