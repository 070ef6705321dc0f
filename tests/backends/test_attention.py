"""Attention over the paged pool against the formula, written out in float64, for all that a layer may ask for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.formula import (
    CPU,
    CUTS,
    LAYERS,
    LENGTHS,
    LONGEST,
    RINGS,
    WITHIN,
    Context,
    Rows,
    chances,
    compiled_context,
    layer,
    off,
    streaming,
)
from trtllm_core.backends.torch import biases, plain
from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch
from trtllm_core.backends.torch.invariant import InvariantContext
from trtllm_core.backends.torch.plain import PlainContext
from trtllm_core.nn import Alibi, Attention
from trtllm_core.parallel import TensorParallel

CONTEXTS = [PagedContext, InvariantContext, compiled_context]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_formula(name: str, cut: str, context: Context) -> None:
    rows = Rows(layer(**LAYERS[name]), LENGTHS)
    assert off(rows.cut(CUTS[cut], context), rows.expected()) < 2e-5


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_however_rows_are_cut(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_bits(name)
    finally:
        torch.set_num_threads(before)


def same_bits(name: str) -> None:
    whole = Rows(layer(**LAYERS[name]), LENGTHS).cut(CUTS["whole"], InvariantContext)
    for cut in CUTS.values():
        parts = Rows(layer(**LAYERS[name]), LENGTHS).cut(cut, InvariantContext)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ["rotary", "alibi, six heads of two", "all", "softcap, window"])
def test_rings(name: str, ring: str, cut: str, context: Context) -> None:
    """What a ring has overwritten, a mask would hide; a call's first tokens see what its last ones overwrite."""
    rows = Rows(layer(**LAYERS[name]), LENGTHS, ring=RINGS[ring])
    assert off(rows.cut(CUTS[cut], context), rows.expected()) < 2e-5


@pytest.mark.parametrize("context", [PlainContext, InvariantContext])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ring", [(24, 4), (19, 0), (6, 5), (None, 0)])
@pytest.mark.parametrize("name", WITHIN)
def test_positions_within_the_cache(name: str, ring: tuple[int | None, int], cut: str, context: Context) -> None:
    rows = Rows(layer(**WITHIN[name]), LENGTHS, ring=ring, positions="cache")
    expected = [streaming(rows.layer, x.double(), rows.plan).float() for x in rows.qkv]
    assert off(rows.cut(CUTS[cut], context), expected) < 2e-5
    if ring[1] and rows.layer.sliding_window is None:  # else the layer hides the sinks, too
        assert off(expected, rows.expected()) > 0.05, "or the test would show nothing"


def test_plain_is_as_right_as_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in LAYERS.items():
        rows = Rows(layer(**options), LENGTHS)
        assert off(rows.cut(CUTS["ragged"], PlainContext), rows.expected()) < 2e-5, name
    monkeypatch.setattr(plain, "SCORES", 4 * 70 * 3)  # three queries at a time
    rows = Rows(layer(**LAYERS["all"]), LENGTHS)
    assert off(rows.cut(CUTS["whole"], PlainContext), rows.expected()) < 2e-5


def test_attention_scores() -> None:
    """Of each row and entry, over the queries of a call and the heads of a group."""
    rows = Rows(layer(rotary=32), (20, 9), scores=True)
    for counts in ({0: 12, 1: 5}, {1: 3, 0: 8}):
        past = {row: rows.past[row] for row in counts}
        rows.run(counts, PlainContext)
        for row, (looked,) in zip(counts, rows.looked, strict=True):
            end = past[row] + counts[row]
            qkv = rows.qkv[row][:end].double()
            whole = chances(rows.layer, qkv)[:, past[row] :]  # [heads, queries, entries]
            torch.testing.assert_close(looked.double(), whole.unflatten(0, (2, 2)).sum((1, 2)), rtol=1e-5, atol=1e-5)
            assert looked.sum().item() == pytest.approx(4 * counts[row], rel=1e-5)


def test_rings_in_half_precision() -> None:
    rows = Rows(layer(**LAYERS["all"]), LENGTHS, torch.bfloat16, ring=(24, 4))
    assert rows.layer.rotary is not None
    rows.layer.rotary.prepare(LONGEST, CPU, torch.bfloat16)
    assert off(rows.cut(CUTS["ragged"], PagedContext), rows.expected()) < 0.2


def test_a_ring_shows() -> None:
    """The comparison can fail."""
    rows = Rows(layer(rotary=32), LENGTHS)
    whole = rows.cut(CUTS["ragged"], PagedContext)
    for ring in ((19, 0), (24, 4)):
        assert off(whole, Rows(layer(rotary=32), LENGTHS, ring=ring).expected()) > 0.05


def test_a_ring_gives_the_bits_of_a_full_cache_whose_layers_have_a_window() -> None:
    """In the batch-invariant mode, however it is cut."""
    windowed = layer(rotary=32, sliding_window=19)
    whole = Rows(windowed, LENGTHS).cut(CUTS["whole"], InvariantContext)
    for ring in ((19, 0), (24, 0)):  # the second remembers more than the layer may see
        for cut in CUTS.values():
            ours = Rows(windowed, LENGTHS, ring=ring).cut(cut, InvariantContext)
            assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_ring_larger_than_the_layers_window_can_take_back_the_difference(context: Context) -> None:
    rows = Rows(layer(rotary=32, sliding_window=11), (60, 60), ring=(16, 0))
    drafts = [x.clone() for x in rows.qkv]
    for back in (5, 3, 1):
        rows.past = [40, 20]
        rows.qkv = [x.clone() for x in drafts]
        rows.cut([[40, 20, 0, 0]], context)  # both have written 60
        rows.past = [60 - back] * 2
        for x in rows.qkv:
            x[60 - back :] += 1.0
        ours = rows.run({0: back, 1: back}, context)
        expected = [x[60 - back :] for x in rows.expected()]
        assert off([ours[0], ours[1]], expected) < 2e-5


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("size", [32, 40, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_sizes_of_heads(size: int, heads: int, kv_heads: int, context: Context) -> None:
    for options in ({"rotary": size // 4}, {"alibi": True}, {"softcap": 5.0}):
        rows = Rows(layer(heads, kv_heads, size, **options), (20, 1, 9))  # type: ignore[arg-type]
        assert off(rows.cut([[9, 1, 4], [1, 1, 1], [1, 0, 1]], context), rows.expected()) < 2e-5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_in_any_combination(data: st.DataObject) -> None:
    group, kv_heads = data.draw(st.sampled_from([(1, 1), (1, 3), (4, 1), (2, 3)]))
    options = {
        "size": data.draw(st.sampled_from([32, 48])),
        "rotary": data.draw(st.sampled_from([None, 8, 32])),
        "alibi": data.draw(st.booleans()),
        "softcap": data.draw(st.sampled_from([None, 2.0])),
        "sliding_window": data.draw(st.sampled_from([None, 1, 7, 200])),
    }
    sizes = data.draw(st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=1, max_size=4))
    lengths = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    context = data.draw(st.sampled_from([PagedContext, InvariantContext]))
    ring = data.draw(st.sampled_from([(None, 0), (9, 0), (16, 3), (21, 20), (64, 5)]))
    rows = Rows(layer(group * kv_heads, kv_heads, **options), lengths, ring=ring)
    ours = rows.cut([*sizes, [40] * 4], context)
    assert off(ours, rows.expected()) < 2e-5


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    for cut in ("whole", "steps", "ragged"):
        rows = Rows(layer(**LAYERS[name]), LENGTHS, dtype)
        if rows.layer.rotary is not None:
            rows.layer.rotary.prepare(LONGEST, CPU, dtype)
        largest = max(x.abs().max().item() for x in rows.qkv)
        assert off(rows.cut(CUTS[cut], PagedContext), rows.expected()) < 0.02 * largest


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "plain"])
def test_each_feature_shows(name: str) -> None:
    """The comparison can fail: without its features a layer gives something else."""
    rows = Rows(layer(**LAYERS[name]), LENGTHS)
    plain = {key: value for key, value in LAYERS[name].items() if key in ("heads", "kv_heads", "size")}
    rows.layer = layer(**plain)
    without = rows.cut(CUTS["ragged"], PagedContext)
    rows.layer = layer(**LAYERS[name])
    assert off(without, rows.expected()) > 0.05


def test_capped_scores_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biases, "SCORES", 4 * 70 * 3)  # three queries at a time
    for name in ("softcap", "softcap, window", "all"):
        rows = Rows(layer(**LAYERS[name]), LENGTHS)
        assert off(rows.cut(CUTS["whole"], PagedContext), rows.expected()) < 2e-5


def test_biases_are_made_once_a_call_and_small() -> None:
    """Two layers share them; a prompt's are one vector a head, not a matrix."""
    first = layer(alibi=True)
    second = Attention(0, 4, 2, 32, alibi=first.alibi)
    rows = Rows(first, (100, 60))
    inputs = {
        "query_lengths": torch.tensor([100, 60], dtype=torch.int32),
        "past_lengths": torch.zeros(2, dtype=torch.int32),
        "block_tables": torch.from_numpy(rows.blocks),
    }
    context = PagedContext(PackedBatch(inputs, rows.plan, CPU), rows.pool, torch.arange(160))
    for attention in (first, second):
        attention(torch.cat(rows.qkv), context)
    assert [mask.untyped_storage().nbytes() for mask in context._masks.values()] == [4 * 4 * 199, 4 * 4 * 119]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_the_slopes_of_their_heads(size: int) -> None:
    whole = Alibi(12, TensorParallel()).slopes
    parts = [Alibi(12, TensorParallel(rank, size)).slopes for rank in range(size)]
    assert sum(parts, ()) == whole
    assert whole[:8] == tuple(2.0**-i for i in range(1, 9))
    assert whole[8:] == tuple(2.0 ** -(i / 2) for i in (1, 3, 5, 7))


@pytest.mark.cuda
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_cuda(name: str, dtype: torch.dtype, tolerance: float, mixed: bool) -> None:
    device, context = torch.device("cuda"), PagedContext
    if mixed:
        context = pytest.importorskip("trtllm_core.backends.torch.cuda.context").MixedContext
    for cut in CUTS.values():
        rows = Rows(layer(**LAYERS[name]), LENGTHS, dtype, device=device)
        if rows.layer.rotary is not None:
            rows.layer.rotary.prepare(LONGEST, device, dtype)
        if rows.layer.alibi is not None:
            rows.layer.alibi.prepare(device)
        largest = max(x.abs().max().item() for x in rows.qkv)
        assert off(rows.cut(cut, context), rows.expected()) < tolerance * largest
