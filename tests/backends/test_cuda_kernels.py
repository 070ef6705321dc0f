"""The Triton kernels against PyTorch in float64, on fresh random numbers: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch
from trtllm_core.backends.torch.cuda import context as cuda_context
from trtllm_core.backends.torch.cuda.cache import CudaQuantizedCache
from trtllm_core.backends.torch.cuda.context import MixedContext
from trtllm_core.backends.torch.cuda.inputs import DecodeInputs
from trtllm_core.backends.torch.cuda.kernels import splits
from trtllm_core.backends.torch.cuda.kernels.activation import NAMES, activated
from trtllm_core.backends.torch.cuda.kernels.attention import decode_attention
from trtllm_core.backends.torch.cuda.kernels.gemv import TILINGS, Tiling, gemv
from trtllm_core.backends.torch.cuda.kernels.norm import norm
from trtllm_core.backends.torch.cuda.kernels.prompt import place_prompt
from trtllm_core.backends.torch.cuda.kernels.splits import splits_for
from trtllm_core.backends.torch.layer_cache import QuantizedCache
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Alibi, Attention, RotaryEmbedding, rotate_
from trtllm_core.nn.mlp import gelu_tanh, relu_squared
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin.kv_policy import KVModel, KVPlan

CPU = torch.device("cpu")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"heads": 8, "kv_heads": 2},
    "one key head": {"heads": 6, "kv_heads": 1, "rotary": 32},
    "rotary": {"rotary": 32},
    "rotary, in part": {"rotary": 8},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 3.0, "rotary": 32},
    "window": {"sliding_window": 11, "rotary": 32},
    "all": {"alibi": True, "sliding_window": 20, "softcap": 4.0, "scale": 0.3, "rotary": 16},
    "size 80": {"size": 80, "rotary": 80},
    "size 8": {"size": 8, "rotary": 8},
}
PAST = [5, 0, 130, 64, 63, 7]


def layer(
    dtype: torch.dtype,
    device: torch.device,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 32,
    rotary: int | None = None,
    alibi: bool = False,
    **options: Any,
) -> Attention:
    turn = None if rotary is None else RotaryEmbedding(rotary, 10000.0, 200)
    bias = Alibi(heads, TensorParallel()) if alibi else None
    if turn:
        turn.prepare(200, device, dtype)
    if bias:
        bias.prepare(device)
    return Attention(0, heads, kv_heads, size, rotary=turn, alibi=bias, **options)


def filled(plan: KVPlan, dtype: torch.dtype, device: torch.device) -> tuple[KVPool, KVPool]:
    """Ours and the float64 twin, holding the same."""
    pools = KVPool(plan, dtype, device), KVPool(plan, torch.float64, CPU)
    if pools[0].scales is None or pools[1].scales is None:
        pools[0].storage.normal_()
    else:
        for cache in pools[1].layers:
            cache.write(torch.arange(len(cache.data)), torch.randn(cache.data.shape))
        pools[0].storage.copy_(pools[1].storage)
        pools[0].scales.copy_(pools[1].scales)
    pools[1].storage.copy_(pools[0].storage)
    return pools


def contents(pool: KVPool) -> torch.Tensor:
    """float64 ``[entries, 2 * kv_heads, head_size]``: what the first layer's cache holds."""
    return pool.layers[0].blocks(torch.arange(pool.plan.num_blocks, device=pool.storage.device)).cpu().double()


def attended(
    options: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    block: int,
    bucket: int,
    past: list[int],
    kv: str = "float32",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ours and the float64 twin: outputs, and the pool after it."""
    ours, twin = layer(dtype, device, **options), layer(torch.float64, CPU, **options)
    count, width = len(past), 160 // block + 1
    model = KVModel(1, ours.num_kv_heads, ours.head_size, kv, 0)
    plan = KVPlan(count * width, block, width, model)
    pools = filled(plan, dtype, device)
    tables = torch.randperm(count * width).int().view(count, width)
    qkv = torch.randn(bucket, ours.num_heads + 2 * ours.num_kv_heads, ours.head_size).to(dtype)
    inputs = DecodeInputs(bucket, bucket * width, device)
    numbers = torch.tensor(past)
    inputs.clear(bucket)
    inputs.send(bucket, numbers.numpy(), numbers.numpy(), numbers.numpy(), tables.numpy(), block)
    given = qkv.to(device)
    out = decode_attention(ours, given, pools[0].layers[0], inputs.rows(bucket, 160), block)
    assert torch.equal(given.cpu(), qkv), "its input stays as it is"
    batch = PackedBatch(
        {
            "query_lengths": torch.ones(count, dtype=torch.int32),
            "past_lengths": numbers.int(),
            "block_tables": tables,
        },
        plan,
        CPU,
    )
    expected = PagedContext(batch, pools[1], numbers).attend(twin, qkv[:count].double())
    return out.cpu().double(), expected, contents(pools[0]), contents(pools[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_attention(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other lengths, in blocks in disorder; two rows of the bucket are none."""
    monkeypatch.setattr(splits, "PROGRAMS", 24)
    for block in (8, 64):
        out, expected, pool, pool_expected = attended(LAYERS[name], torch.device(device), torch.float32, block, 8, PAST)
        torch.testing.assert_close(out[: len(PAST)], expected, rtol=1e-4, atol=1e-4)
        assert not out[len(PAST) :].any()
        torch.testing.assert_close(pool, pool_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["plain", "one key head", "all", "size 80"])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_attention_over_codes(kv: str, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "PROGRAMS", 24)
    for block in (8, 64):
        out, expected, pool, pool_expected = attended(
            LAYERS[name], torch.device(device), torch.float32, block, 8, PAST, kv
        )
        # A few numbers lie half-way between two codes and may become either.
        assert (out[: len(PAST)] - expected).norm() / expected.norm() < 5e-4
        assert not out[len(PAST) :].any()
        assert (pool - pool_expected).norm() / pool_expected.norm() < 5e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e4])
def test_codes_in_half_precision(spread: float, kv: str, device: str) -> None:
    """Queries, keys and values far beyond what half precision holds, and far below it."""
    where, count, longest = torch.device(device), 3, 300
    ours = layer(torch.bfloat16, where, heads=8, kv_heads=2, size=64, scale=1e-2 / spread**2)
    twin = layer(torch.float64, CPU, heads=8, kv_heads=2, size=64, scale=1e-2 / spread**2)
    plan = KVPlan(count * 5, 64, 5, KVModel(1, 2, 64, kv, 0))
    pools = KVPool(plan, torch.bfloat16, where), KVPool(plan, torch.float64, CPU)
    pools[1].layers[0].write(torch.arange(plan.num_blocks * 64), spread * torch.randn(plan.num_blocks * 64, 4, 64))
    assert pools[0].scales is not None
    assert pools[1].scales is not None
    pools[0].storage.copy_(pools[1].storage)
    pools[0].scales.copy_(pools[1].scales)
    qkv = (spread * torch.randn(count, 12, 64)).bfloat16()
    tables, past = torch.arange(count * 5).int().view(count, 5), torch.tensor([longest, 0, 77])
    inputs = DecodeInputs(count, count * 5, where)
    inputs.send(count, past.numpy(), past.numpy(), past.numpy(), tables.numpy(), 64)
    out = decode_attention(ours, qkv.to(where), pools[0].layers[0], inputs.rows(count, 320), 64).cpu().double()
    lengths = torch.ones(count, dtype=torch.int32)
    batch = PackedBatch({"query_lengths": lengths, "past_lengths": past.int(), "block_tables": tables}, plan, CPU)
    expected = PagedContext(batch, pools[1], past).attend(twin, qkv.double())
    assert (out - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_codes_are_written_and_read(kv: str, device: str) -> None:
    where = torch.device(device)
    plan = KVPlan(6, 8, 6, KVModel(1, 3, 20, kv, 0))
    made, twin = (KVPool(plan, torch.float32, place).layers[0] for place in (where, CPU))
    assert isinstance(made, QuantizedCache)
    ours = CudaQuantizedCache(made.data, made.scales, kv, torch.float32)
    entries, values = torch.randperm(48)[:30], torch.randn(30, 6, 20)
    values[3, 2] = 0.0
    values[4, 1, 7] = torch.nan
    whole = torch.cat((torch.randn(30, 2, 20), values), 1)[:, 2:]  # a view, as keys and values of a product are
    some = torch.tensor([4, 1])
    pairs = [
        (ours.write(entries.to(where), whole.to(where)), twin.write(entries, values)),
        (ours.gather(entries.to(where)), twin.gather(entries)),
        (ours.blocks(some.to(where)), twin.blocks(some)),
        (ours.read(slice(5, 29)), twin.read(slice(5, 29))),
    ]
    for seen, expected in pairs:
        torch.testing.assert_close(seen.cpu(), expected, equal_nan=True)
    assert twin.gather(entries[4:5])[0, 1].isnan().all(), "of a head, all is unknown"
    assert not twin.gather(entries[3:4]).isnan().any(), "a head of zeros has a scale, too"


@pytest.mark.parametrize("device", DEVICES)
def test_attention_without_splits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert splits_for(1, 4, 9000) == 32
    assert splits_for(1, 4, 400) == 8, "none would have anything to do"
    assert splits_for(300, 8, 9000) == 1
    assert [splits_for(32, 8, longest) for longest in (300, 4096)] == [1, 2]
    assert splits_for(32, 8, 9000, coded=True) == 1
    monkeypatch.setattr(splits, "PROGRAMS", 1)
    where = torch.device(device)
    out, expected, *_ = attended({"rotary": 32}, where, torch.float32, 16, len(PAST), PAST)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_attention_in_half_precision(dtype: torch.dtype, size: int) -> None:
    options = {"heads": 8, "kv_heads": 2, "size": size, "rotary": size}
    out, expected, *_ = attended(options, torch.device("cuda"), dtype, 64, 8, PAST)
    assert ((out[: len(PAST)] - expected).norm() / expected.norm()) < 1e-2


def test_the_inputs_of_a_step_are_laid_out_by_bucket() -> None:
    inputs = DecodeInputs(8, 40, CPU)
    tables = torch.arange(15).view(3, 5).int().numpy()
    ids, past = torch.tensor([7, 8, 9]), torch.tensor([3, 20, 0])
    inputs.send(4, ids.numpy(), past.numpy() + 1, past.numpy(), tables, 8)
    rows = inputs.rows(4, 40)
    assert inputs.ids(4).tolist() == [7, 8, 9, 0]
    assert rows.positions.tolist() == [4, 21, 1, 0]
    assert rows.past.tolist() == [3, 20, 0, -1]
    assert inputs.last.item() == 2
    assert rows.width.item() == 3  # what the longest row needs
    assert rows.tables[:9].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    inputs.send(4, ids + 1, past.numpy(), past.numpy(), tables, 8)
    assert inputs.ids(4).tolist() == [8, 9, 10, 0], "ids may be a tensor already"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [48, 64, 1000])
def test_norms(size: int, device: str) -> None:
    x, weight, bias = torch.randn(5, 3, size, device=device), *torch.randn(2, size, device=device)
    wide = x.double()
    rms = functional.rms_norm(wide, (size,), weight.double(), 1e-5)
    torch.testing.assert_close(norm(x, weight, None, 1e-5, False).double(), rms, rtol=1e-5, atol=1e-5)
    centred = functional.layer_norm(wide + 3, (size,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(norm(x + 3, weight, bias, 1e-5, True).double(), centred, rtol=1e-4, atol=1e-4)
    part = torch.randn(4, 2 * size, device=device)[:, :size]
    expected = functional.rms_norm(part.double(), (size,), weight.double(), 1e-5)
    torch.testing.assert_close(norm(part, weight, None, 1e-5, False).double(), expected, rtol=1e-5, atol=1e-5)


FUNCTIONS = {
    "none": lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": functional.relu,
    "relu2": relu_squared,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_activations(name: str, device: str) -> None:
    x = 3 * torch.randn(2, 3, 1100, device=device)
    torch.testing.assert_close(activated(x, name, False).double(), FUNCTIONS[name](x.double()), rtol=1e-5, atol=1e-5)
    gate, other = x.double().chunk(2, dim=-1)
    torch.testing.assert_close(activated(x, name, True).double(), FUNCTIONS[name](gate) * other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(24, 64), (6, 100), (130, 1500)])
def test_products_of_one_row(shape: tuple[int, int], device: str) -> None:
    tilings = TILINGS if device == "cuda" else (Tiling(4, 64, 4), Tiling(8, 256, 4), Tiling(8, 512, 4, 2))
    x, weight = torch.randn(1, shape[1], device=device), torch.randn(shape, device=device)
    bias, residual = torch.randn(shape[0], device=device), torch.randn(1, shape[0], device=device)
    plain = functional.linear(x.double(), weight.double())
    for tiling in tilings:
        y = gemv(x, weight, None, tiling)
        torch.testing.assert_close(y.double(), plain, rtol=1e-4, atol=1e-4)
        y = gemv(x, weight, bias, tiling, activation="gelu_tanh")
        torch.testing.assert_close(y.double(), gelu_tanh(plain + bias.double()), rtol=1e-4, atol=1e-4)
        gate, other = (plain + bias.double()).chunk(2, dim=-1)
        y = gemv(x, weight, bias, tiling, activation="silu", gated=True)
        torch.testing.assert_close(y.double(), functional.silu(gate) * other, rtol=1e-3, atol=1e-3)
        given = residual.clone()
        y = gemv(x, weight, bias, tiling, residual=given)
        assert y is given
        torch.testing.assert_close(y.double(), plain + bias.double() + residual.double(), rtol=1e-4, atol=1e-4)


def plain_flash(layer: Attention, q: torch.Tensor, kv: torch.Tensor, prompts: cuda_context.Prompts) -> torch.Tensor:
    """What ``_flash`` says that it does, sequence by sequence."""
    out = torch.empty_like(q)
    starts, ends = prompts.queries.starts.tolist(), prompts.keys.starts.tolist()
    for (first, last), (begin, end) in zip(pairwise(starts), pairwise(ends), strict=True):
        assert last - first <= prompts.queries.longest
        assert end - begin <= prompts.keys.longest
        k, v = kv[begin:end].repeat_interleave(layer.num_heads // layer.num_kv_heads, 1).chunk(2, dim=1)
        offset = torch.arange(end - begin) - torch.arange(end - begin - (last - first), end - begin)[:, None]
        seen = offset <= 0
        if layer.sliding_window is not None:
            seen &= offset > -layer.sliding_window
        scores = torch.einsum("qhd,khd->hqk", q[first:last], k) * layer.scale
        chances = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", chances, v)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kv", ["float32", "int8", "fp8"])
@pytest.mark.parametrize(
    ("rows", "cached"),
    [
        (
            [1, 30, 1, 5, 2, 7],
            [40, 0, 3, 0, 0, 20],
        ),  # one token, a prompt, one token, two prompts, a chunk behind others
        # Nothing but prompts; a single one; nothing but chunks.
        ([9, 17, 30], [0, 0, 0]),
        ([33], [0]),
        ([5, 20], [31, 8]),
    ],
)
def test_prompts_chunks_and_decoding_rows_share_a_call(
    rows: list[int], cached: list[int], kv: str, fused: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "PROGRAMS", 4)
    monkeypatch.setattr(cuda_context, "FUSED_FROM", 1 if fused else 1000)
    if device == "cpu":  # there, the packing alone is what is tested
        monkeypatch.setattr(cuda_context, "FUSED", (torch.float32,))
        monkeypatch.setattr(cuda_context, "_flash", plain_flash)
    where, dtype = torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32
    options = {"rotary": 32, "sliding_window": 24}
    ours, twin = layer(dtype, where, **options), layer(torch.float64, CPU, **options)
    lengths, past = torch.tensor(rows).int(), torch.tensor(cached).int()
    plan = KVPlan(48, 8, 8, KVModel(1, 2, 32, kv, 0))
    pools = filled(plan, dtype, where)
    inputs = {
        "query_lengths": lengths,
        "past_lengths": past,
        "block_tables": torch.randperm(48).int().view(6, 8)[: len(rows)],
    }
    positions = torch.cat([torch.arange(p, p + n) for p, n in zip(past.tolist(), lengths.tolist(), strict=True)])
    qkv = torch.randn(len(positions), 8, 32).to(dtype)
    context = MixedContext(PackedBatch(inputs, plan, where), pools[0], positions.to(where))
    out = context.attend(ours, qkv.to(where, copy=True)).cpu().double()
    expected = PagedContext(PackedBatch(inputs, plan, CPU), pools[1], positions).attend(twin, qkv.double())
    # A few numbers lie half-way between two codes and may become either.
    exact = 1e-5 if kv == "float32" else 5e-4
    assert (out - expected).norm() / expected.norm() < (1e-2 if device == "cuda" else exact)
    kept, expected = contents(pools[0]), contents(pools[1])
    assert (kept - expected).norm() / expected.norm() < (1e-2 if device == "cuda" else exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["groups", "rotary", "rotary, in part", "size 80"])
@pytest.mark.parametrize("kv", ["float32", "int8", "fp8"])
def test_a_prompt_is_rotated_and_written(kv: str, name: str, device: str) -> None:
    where = torch.device(device)
    ours, twin = layer(torch.float32, where, **LAYERS[name]), layer(torch.float64, CPU, **LAYERS[name])
    bucket, count, block = 32, 21, 8
    heads, kv_heads, size = ours.num_heads, ours.num_kv_heads, ours.head_size
    qkv, table = torch.randn(bucket, heads + 2 * kv_heads, size), torch.randperm(6).int().view(1, 6)
    pools = filled(KVPlan(6, block, 6, KVModel(1, kv_heads, size, kv, 0)), torch.float32, where)
    inputs, numbers = DecodeInputs(bucket, 6, where), torch.arange(count).numpy()
    inputs.send(bucket, numbers, numbers, numbers, table.numpy(), block)
    given = qkv.to(where)
    out = place_prompt(ours, given, pools[0].layers[0], inputs.rows(bucket, 160), block)
    expected = qkv.double()
    if twin.rotary is not None:
        rotate_(expected[:count], heads + kv_heads, *twin.rotary(torch.arange(count)))
    token = torch.arange(count)
    place = table[0, token // block] * block + token % block
    expected[:count, heads:] = pools[1].layers[0].write(place, expected[:count, heads:].clone())
    exact = 1e-5 if kv == "float32" else 5e-4  # a few numbers lie half-way between two codes and may become either
    assert (out[:count].cpu().double() - expected[:count]).norm() / expected[:count].norm() < exact
    assert (contents(pools[0]) - contents(pools[1])).norm() / contents(pools[1]).norm() < exact
    assert torch.equal(given.cpu(), qkv)
