"""Attention over the paged pool against the formula, written out in float64, for all that a layer may ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core.backends.torch import biases, plain
from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch
from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu.attention import DecodeAttention
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.invariant import InvariantContext
from trtllm_core.backends.torch.plain import PlainContext
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.nn import Alibi, Attention, RotaryEmbedding
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin.kv_policy import KVModel, KVPlan

BLOCK, LONGEST, CPU = 8, 160, torch.device("cpu")


def compiled_context(batch: PackedBatch, pool: KVPool, positions: torch.Tensor) -> PagedContext:
    """With our own kernel where every row runs one token."""
    try:
        kernels = Kernels(pool.storage.dtype, cache_folder())
    except EngineUnsupportedError as error:
        pytest.skip(str(error))
    return DecodeAttention(kernels).context(batch, pool, positions)


Context = Callable[[PackedBatch, KVPool, torch.Tensor], PagedContext]
CONTEXTS = [PagedContext, InvariantContext, compiled_context]


def layer(heads: int = 4, kv_heads: int = 2, size: int = 32, rotary: int | None = None, alibi: bool = False,
          **options: Any) -> Attention:  # fmt: skip
    """A layer that is ready: ``rotary`` is the rotated part of a head."""
    turn = None if rotary is None else RotaryEmbedding(rotary, 10000.0, LONGEST)
    bias = Alibi(heads, TensorParallel()) if alibi else None
    if turn:
        turn.prepare(LONGEST, CPU, torch.float32)
    if bias:
        bias.prepare(CPU)
    return Attention(0, heads, kv_heads, size, rotary=turn, alibi=bias, **options)


class Rows:
    """Sequences of random queries, keys and values, and a pool with blocks in disorder for them; ``ring`` is window and
    sinks of their caches."""

    def __init__(
        self,
        attention: Attention,
        lengths: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        ring: tuple[int | None, int] = (None, 0),
        device: torch.device = CPU,
        **plan: Any,
    ) -> None:
        self.layer, self.device = attention, device
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        random = torch.Generator().manual_seed(sum(lengths))
        self.qkv = [torch.randn(n, heads + 2 * kv_heads, size, generator=random) for n in lengths]
        self.qkv = [(2 * x).to(dtype) for x in self.qkv]
        blocks = -(-LONGEST // BLOCK)
        self.blocks = np.random.default_rng(0).permutation(len(lengths) * blocks).astype(np.int32).reshape(-1, blocks)
        model = KVModel(1, kv_heads, size, str(dtype).removeprefix("torch."), 0)
        if ring[0] is not None:  # a ring has no more blocks than it needs
            self.blocks[:, -(-ring[0] // BLOCK) :] = -1
        self.plan = KVPlan(self.blocks.size, BLOCK, blocks, model, *ring, **plan)
        self.pool = KVPool(self.plan, dtype, device)
        self.past = [0] * len(lengths)

    def run(self, counts: dict[int, int], context: Context) -> dict[int, torch.Tensor]:
        """The next ``counts[row]`` tokens of each row, in one call."""
        rows, past = list(counts), [self.past[row] for row in counts]
        inputs = {
            "query_lengths": torch.tensor(list(counts.values()), dtype=torch.int32),
            "past_lengths": torch.tensor(past, dtype=torch.int32),
            "block_tables": torch.from_numpy(self.blocks[rows]),
        }
        positions = torch.cat([torch.arange(p, p + n) for p, n in zip(past, counts.values(), strict=True)])
        packed = torch.cat([self.qkv[row][p : p + counts[row]] for row, p in zip(rows, past, strict=True)])
        made = context(PackedBatch(inputs, self.plan, self.device), self.pool, positions.to(self.device))
        out = self.layer(packed.to(self.device, copy=True), made).cpu()
        self.looked = made.scores if isinstance(made, PlainContext) else []
        for row, count in counts.items():
            self.past[row] += count
        return dict(zip(rows, torch.split(out, list(counts.values())), strict=True))

    def cut(self, sizes: list[list[int]], context: Context) -> list[torch.Tensor]:
        """Every row in pieces, taken from ``sizes`` in turn, all rows together."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.qkv]
        for turn in range(LONGEST):
            left = [len(x) - past for x, past in zip(self.qkv, self.past, strict=True)]
            counts = {row: min(sizes[turn % len(sizes)][row % 4], n) for row, n in enumerate(left)}
            counts = {row: n for row, n in counts.items() if n}
            for row, out in self.run(counts, context).items() if counts else ():
                parts[row].append(out)
        return [torch.cat(part) for part in parts]

    def expected(self) -> list[torch.Tensor]:
        return [reference(self.layer, x.double(), self.plan).float() for x in self.qkv]


def reference(layer: Attention, qkv: torch.Tensor, plan: KVPlan) -> torch.Tensor:
    """``qkv [n, heads + 2 * kv_heads, d]`` -> ``[n, heads * d]``, element by element as the papers have it."""
    return torch.einsum("hij,jhd->ihd", *weights_and_values(layer, qkv, plan)).flatten(1)


def chances(layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
    """``[heads, n, n]``: how much each token looks at each."""
    return weights_and_values(layer, qkv, None)[0]


def weights_and_values(layer: Attention, qkv: torch.Tensor, plan: KVPlan | None) -> tuple[torch.Tensor, torch.Tensor]:
    heads, kv_heads, n = layer.num_heads, layer.num_kv_heads, len(qkv)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    if layer.rotary is not None:
        half = layer.rotary.dim // 2
        turns = torch.polar(
            torch.ones(n, half).double(), torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
        )[:, None]

        def rotated(x: torch.Tensor) -> torch.Tensor:
            turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turns
            return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

        q, k = rotated(q), rotated(k)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    if layer.alibi is not None:
        scores = scores - torch.tensor(layer.alibi.slopes).double()[:, None, None] * distance
    seen = distance >= 0
    if layer.sliding_window is not None:
        seen &= distance < layer.sliding_window
    if plan is not None and plan.window is not None:
        seen &= (distance < plan.window - plan.sink) | (torch.arange(n) < plan.sink)
    return scores.masked_fill(~seen, -math.inf).softmax(-1), v


def streaming(layer: Attention, qkv: torch.Tensor, plan: KVPlan) -> torch.Tensor:
    """As StreamingLLM has it: for each token what its cache holds, oldest first, and its places there as positions."""
    heads, kv_heads, n = layer.num_heads, layer.num_kv_heads, len(qkv)
    half = 0 if layer.rotary is None else layer.rotary.dim // 2

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [places, heads, d]
        angle = torch.arange(len(x))[:, None] * 10000.0 ** -(torch.arange(half).double() / max(half, 1))
        turned = (
            torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

    out = []
    for i in range(n):
        window = n if plan.window is None else plan.window
        held = [p for p in range(i + 1) if p < plan.sink or p > i - (window - plan.sink)]
        kept = torch.tensor(held)
        place = torch.arange(len(held))
        places = qkv[kept]
        q = rotated(places[:, :heads])[-1]
        k = rotated(places[:, heads : heads + kv_heads]).repeat_interleave(heads // kv_heads, 1)
        v = places[:, heads + kv_heads :].repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("hd,jhd->hj", q, k) * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        if layer.alibi is not None:
            scores = scores - torch.tensor(layer.alibi.slopes).double()[:, None] * (len(held) - 1 - place)
        if layer.sliding_window is not None:
            scores = scores.masked_fill(kept <= i - layer.sliding_window, -math.inf)
        out.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(out)


def off(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max((a.float() - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


LENGTHS = (33, 1, 70, 52)
CUTS = {
    "whole": [[70, 70, 70, 70]],
    "steps": [[1, 1, 1, 1]],
    "alone": [[70, 0, 0, 0], [0, 1, 0, 0], [0, 0, 40, 0], [0, 0, 1, 0], [0, 0, 40, 0], [0, 0, 0, 70]],
    "ragged": [[5, 1, 40, 3], [1, 0, 1, 1], [9, 0, 2, 1], [1, 1, 1, 40]],
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": 32},
    "partial": {"rotary": 8},
    "alibi": {"alibi": True},
    "alibi, three heads": {"heads": 3, "kv_heads": 3, "alibi": True},
    "alibi, six heads of two": {"heads": 6, "kv_heads": 2, "alibi": True},
    "alibi, one kv head": {"heads": 5, "kv_heads": 1, "alibi": True, "sliding_window": 11},
    "softcap": {"softcap": 3.0},
    "softcap, window": {"softcap": 3.0, "rotary": 16, "sliding_window": 9, "kv_heads": 4},
    "all": {"softcap": 3.0, "rotary": 16, "alibi": True, "sliding_window": 11, "scale": 0.3},
    "window": {"rotary": 32, "sliding_window": 11},
}


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


RINGS = {"ring": (19, 0), "sinks": (24, 4), "one": (6, 5), "never full": (100, 3)}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", ["rotary", "alibi, six heads of two", "all", "softcap, window"])
def test_rings(name: str, ring: str, cut: str, context: Context) -> None:
    """What a ring has overwritten, a mask would hide; a call's first tokens see what its last ones overwrite."""
    rows = Rows(layer(**LAYERS[name]), LENGTHS, ring=RINGS[ring])
    assert off(rows.cut(CUTS[cut], context), rows.expected()) < 2e-5


WITHIN = {
    "rotary": {"rotary": 32},
    "partial": {"rotary": 8, "kv_heads": 1},
    "alibi": {"alibi": True},
    "all": {"softcap": 3.0, "rotary": 16, "alibi": True, "sliding_window": 21, "scale": 0.3},
}


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
