"""Products of few rows and of quantised weights by Triton kernels, against PyTorch in float64, on fresh random numbers:
interpreted on the CPU, compiled on a GPU. Then engines with such weights, against the plain product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from trtllm_core.backends.torch.cuda.kernels.coded import CODED_TILINGS, Codes, coded_gemv
from trtllm_core.backends.torch.cuda.kernels.gemv import TILINGS, Tiling
from trtllm_core.backends.torch.cuda.kernels.rounded import dequantized, rounded_rows
from trtllm_core.backends.torch.cuda.kernels.skinny import BLOCKS, CODED_BLOCKS, Blocks, skinny
from trtllm_core.backends.torch.cuda.layers import accelerate
from trtllm_core.backends.torch.cuda.library import library_product
from trtllm_core.backends.torch.cuda.product import Product
from trtllm_core.backends.torch.cuda.tuning import FEW, Choice, Tunings, candidates
from trtllm_core.backends.torch.cuda.weights import codes_of, halved
from trtllm_core.backends.torch.executable import TorchExecutable
from trtllm_core.backends.torch.quantized import RoundedProduct
from trtllm_core.config import BuildConfig, QuantizationConfig, QuantizedLayer
from trtllm_core.engine.build import build_engine
from trtllm_core.nn import Linear
from trtllm_core.nn.linear import MatMul
from trtllm_core.nn.mlp import gelu_tanh
from trtllm_core.nn.quantized import PlainProduct, weight_of
from trtllm_core.plugin import Plugins
from trtllm_core.plugin.kv_policy import KVModel, KVPlan
from trtllm_core.quantize import QuantizedWeight, float8_rows, quantize
from trtllm_core.quantize.gguf import widened
from trtllm_core.session import Session
from trtllm_core.testing.checkpoints import write_llama

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
FORMS = {
    "4 bits": (4, "symmetric", 32),
    "4 bits, offsets": (4, "offsets", 32),
    "4 bits, zero points": (4, "zero_points", 64),
    "4 bits, groups of 128": (4, "symmetric", 128),
    "8 bits": (8, "symmetric", 32),
    "8 bits, offsets": (8, "offsets", 64),
    "8 bits, a scale a row": (8, "symmetric", 384),
    "e4m3": (8, "float8", 384),
}
WIDTH = 384


def made(form: str, out: int, width: int = WIDTH) -> QuantizedWeight:
    bits, kind, group = FORMS[form]
    how = QuantizedLayer(bits=bits, group_size=width if group == WIDTH else group, form=kind)  # type: ignore[arg-type]
    if kind == "offsets":
        return widened(quantize(torch.randn(out, width), how.replace(form="symmetric")), how)
    return quantize(torch.randn(out, width), how)


def layer_of(weight: QuantizedWeight, device: str = "cpu", bias: bool = False) -> Linear:
    """A layer with this weight, as an engine's module has it."""
    out, groups = weight.scales.shape
    layer = Linear(groups * weight.layer.group_size, out, bias)
    layer.quantized = weight.layer
    for name, part in weight.parts().items():
        held = torch.nn.Parameter(part.to(device), requires_grad=False)
        setattr(layer, "weight" if name == "codes" else name, held)
    if layer.bias is not None:
        layer.bias.data = torch.randn(out, device=device)
    layer.matmul = PlainProduct(weight)
    return layer


def coded(weight: QuantizedWeight, device: str) -> Codes:
    found = codes_of(layer_of(weight, device))
    assert found is not None
    return found


def twin(weight: QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x.cpu().double(), weight.dequantize().double())


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert (found.cpu().double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_one_row(form: str, device: str) -> None:
    """Scales are rounded to float16 on the way, so that the twin is a little off."""
    weight = made(form, 48)
    given = coded(weight, device)
    x, bias = torch.randn(1, WIDTH, device=device), torch.randn(48, device=device)
    residual = torch.randn(1, 48, device=device)
    plain, b = twin(weight, x), bias.cpu().double()
    for tiling in CODED_TILINGS if device == "cuda" else (Tiling(16, 256, 4), Tiling(16, 128, 4, 2)):
        close(coded_gemv(x, given, None, tiling), plain, 1e-3)
    close(coded_gemv(x, given, bias, tiling, activation="relu"), functional.relu(plain + b), 1e-3)
    gate, other = (plain + b).chunk(2, dim=-1)
    close(coded_gemv(x, given, bias, tiling, activation="silu", gated=True), functional.silu(gate) * other, 2e-3)
    kept = residual.clone()
    assert coded_gemv(x, given, bias, tiling, residual=kept) is kept
    close(kept, plain + b + residual.cpu().double(), 1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [*FORMS, "16 bits"])
def test_few_rows(form: str, device: str) -> None:
    """More than a program has, on rows that do not lie behind one another, with columns shared by programs or not."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tolerance = 1e-2 if device == "cuda" else 1e-3
    weight = None if form == "16 bits" else made(form, 80)
    dense = torch.randn(80, WIDTH, device=device).to(dtype)
    bias = torch.randn(80, device=device).to(dtype)
    given = dense if weight is None else coded(weight, device)
    known = BLOCKS if weight is None else CODED_BLOCKS
    ways = known if device == "cuda" else (Blocks(16, 128, 1, 4, 2), Blocks(64, 64, 4, 4, 2))
    for rows in (1, 11, 70) if device == "cuda" or weight is None else (11,):
        x = torch.randn(rows, WIDTH + 8, device=device).to(dtype)[:, :WIDTH]
        plain = functional.linear(x.cpu().double(), dense.cpu().double()) if weight is None else twin(weight, x)
        residual = torch.randn(rows, 80, device=device).to(dtype)
        for blocks in ways if rows == 11 else ways[:1]:
            close(skinny(x, given, None, blocks), plain, tolerance)
        for blocks in ways[:2]:  # of one part, and of several
            kept = residual.clone()
            assert skinny(x, given, bias, blocks, residual=kept) is kept
            close(kept, plain + bias.cpu().double() + residual.cpu().double(), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 3])
def test_few_rows_and_a_gate(splits: int, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight, blocks = made("e4m3", 96), Blocks(32, 128, splits, 4, 2)
    given, bias, x = coded(weight, device), torch.randn(96).to(device, dtype), torch.randn(5, WIDTH).to(device, dtype)
    plain = twin(weight, x) + bias.cpu().double()
    close(skinny(x, given, bias, blocks, activation="gelu_tanh"), gelu_tanh(plain), 1e-2)
    gate, other = plain.chunk(2, dim=-1)
    found = skinny(x, given, bias, blocks, activation="silu", gated=True)
    close(found, functional.silu(gate) * other, 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_rounded(device: str) -> None:
    x = torch.randn(5, 1003, device=device) * torch.tensor([[1.0], [0.0], [1e-3], [100.0], [3.0]], device=device)
    numbers, scales = rounded_rows(x)
    wanted, wanted_scales = float8_rows(x)
    assert torch.allclose(scales, wanted_scales, rtol=1e-6)
    apart = numbers.float() != wanted.float()
    if device == "cpu":  # the interpreter loses the carry of what is rounded up to a power of two
        apart &= wanted.float().abs().log2() % 1 != 0
    step = wanted.float().abs().clamp(min=2.0**-6) / 8
    assert ((numbers.float() - wanted.float()).abs()[apart] <= step[apart]).all(), "a tie may fall to either side"
    assert apart.float().mean() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_are_none_are_not_hidden(device: str) -> None:
    x = torch.randn(3, 100, device=device)
    x[1, 40] = torch.nan
    numbers, scales = rounded_rows(x)
    assert (numbers.float() * scales.view(-1, 1)).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [name for name in FORMS if name != "e4m3"])
def test_codes_become_numbers(form: str, device: str) -> None:
    weight = made(form, 22)
    found = dequantized(coded(weight, device), 3, 15, torch.float32)
    close(found, weight.dequantize()[3:18].double(), 1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [name for name in FORMS if name != "e4m3"])
def test_the_library_takes_codes_piece_by_piece(form: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtllm_core.backends.torch.cuda.library.PIECE", 20 * WIDTH)
    weight = made(form, 48)
    x, bias, residual = (torch.randn(*shape, device=device) for shape in ((9, WIDTH), (48,), (9, 48)))
    wanted = twin(weight, x) + bias.cpu().double() + residual.cpu().double()
    close(library_product(x, coded(weight, device), bias, residual), wanted, 1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [9, 200])
def test_the_library_rounds_activations_beside_e4m3(rows: int) -> None:
    weight = quantize(torch.randn(272, 512), QuantizedLayer(bits=8, group_size=512, form="float8"))
    x, bias, residual = (torch.randn(*shape).bfloat16() for shape in ((rows, 512), (272,), (rows, 272)))
    rounded = RoundedProduct(weight)(x.double(), weight.codes, bias.double()) + residual.double()
    found = library_product(x.cuda(), coded(weight, "cuda"), bias.cuda(), residual.cuda())
    close(found, rounded, 5e-3)
    plain = twin(weight, x) + bias.double() + residual.double()
    assert (rounded - plain).norm() > 1e-2 * plain.norm(), "what is tested is not nothing"


def test_scales_take_two_bytes_where_they_can() -> None:
    normal = torch.tensor([0.1, -3.3, 0.0, 1e-4])
    assert halved(normal).dtype == torch.float16
    exact = torch.tensor([2.0**-20, 1.0])
    assert torch.equal(halved(exact).float(), exact)
    for wide in (torch.tensor([1.0, 3e-6]), torch.tensor([1e5])):
        assert halved(wide) is wide
    layer = layer_of(made("4 bits, offsets", 8))
    before = PlainProduct(made("4 bits, offsets", 8)).weight.scales.dtype
    assert codes_of(layer) is not None
    assert (before, layer.scales.dtype, layer.offsets.dtype) == (torch.float32, torch.float16, torch.float16)


def test_what_the_kernels_cannot_read_is_left_alone() -> None:
    odd = quantize(torch.randn(8, 40), QuantizedLayer(bits=8, group_size=40, form="symmetric"))
    assert codes_of(layer_of(odd)) is None
    narrow = quantize(torch.randn(9, 64), QuantizedLayer(bits=8, group_size=64, form="float8"))
    assert codes_of(layer_of(narrow)) is None
    module = torch.nn.Sequential(layer_of(odd), layer_of(narrow))
    accelerate(module, torch.float32, True)
    assert all(isinstance(layer.matmul, PlainProduct) for layer in module)  # type: ignore[union-attr]


def test_which_ways_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, ints, floats = torch.randn(8, 64), coded(made("4 bits", 16), "cpu"), coded(made("e4m3", 16), "cpu")
    assert candidates(dense, 1) == (*TILINGS, None)
    assert candidates(dense, 4) == (None, *BLOCKS)
    assert candidates(ints, 1) == CODED_TILINGS
    assert candidates(ints, 16) == (*CODED_BLOCKS, None)
    assert None not in candidates(floats, 64), "activations are rounded from 65 rows on, whatever is faster"
    asked = []

    def measured(product: Product, weights: Any, bias: Any, rows: int) -> list[int] | None:
        asked.append(rows)
        return None if rows == 128 else [64, 128, 4, 4, 4]

    monkeypatch.setattr("trtllm_core.backends.torch.cuda.tuning.measured", measured)
    monkeypatch.setattr("trtllm_core.backends.torch.cuda.tuning._key", lambda *given: str(given[-1]))
    monkeypatch.setattr("trtllm_core.backends.torch.cuda.tuning.MEASURED_FROM", 0)
    for made_before in (False, True):
        tunings = Tunings(tmp_path / "kernels.json")
        choice = Choice(tunings, Product(), [ints], None)
        assert choice(3) == choice(8) == Blocks(64, 128, 4, 4, 4)
        assert choice(100) is None
        assert choice(129) is None
        assert asked == [8, 128], "once a bucket and machine, and not again by the next process"
        assert made_before or (tmp_path / "kernels.json").exists()
    assert Choice(Tunings(tmp_path / "other.json"), Product(), [floats], None)(65) is None


def session(quant: str, folder: Path, plugins: Plugins, tied: bool, dtype: str, **options: Any) -> Session:
    limits = BuildConfig(
        dtype=dtype,
        max_batch_size=8,
        max_input_len=40,
        max_seq_len=64,
        max_num_tokens=128,
        tokens_per_block=16,
        quantization=QuantizationConfig(weights=quant),  # type: ignore[arg-type]
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": tied}
    if not (folder / "engine").exists():
        source = write_llama(folder / "hf", vocab_size=80, **sizes)
        build_engine(source, folder / "engine", limits, plugins=plugins)
    found = Session.from_directory(folder / "engine", plugins=plugins, **options)
    model = found.engine.config.model
    kv = KVModel(model.num_layers, model.num_kv_heads, model.head_size, model.dtype, 0)
    found.engine.allocate_kv(KVPlan(32, 16, 4, kv))
    return found


def logits(found: Session, ids: torch.Tensor, past: int, count: int) -> torch.Tensor:
    """Of the last token of rows ``ids [rows, tokens]``, of which ``past`` are cached."""
    rows, fresh = ids.shape[0], count - past
    device = found.engine.module.head.weight.device if found.engine.module.head else None  # type: ignore[attr-defined]
    device = device or found.engine.module.embedding.weight.device  # type: ignore[attr-defined]
    inputs = {
        "input_ids": ids[:, past:count].reshape(-1),
        "position_ids": torch.arange(past, count).repeat(rows),
        "query_lengths": torch.full((rows,), fresh, dtype=torch.int32),
        "past_lengths": torch.full((rows,), past, dtype=torch.int32),
        "block_tables": torch.arange(rows * 4, dtype=torch.int32).view(rows, 4),
        "logits_indices": torch.arange(1, rows + 1) * fresh - 1,
    }
    out = torch.empty(rows, found.engine.config.vocab_size_padded, device=device)
    found.engine.execute(inputs, {"logits": out}, 0)
    return out.cpu()


@pytest.mark.parametrize(("quant", "tied"), [("int4", True), ("int8", False), ("fp8", True)])
def test_layers_take_the_kernels(quant: str, tied: bool, tmp_path: Path, plugins: Plugins) -> None:
    """On the CPU, interpreted, in float32: with one row and with three."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    plain, ours = (session(quant, tmp_path, plugins, tied, "float32", native=False) for _ in range(2))
    assert isinstance(ours.engine, TorchExecutable)
    for layer in ours.engine.module.modules():
        if isinstance(layer, Linear) and layer.quantized is not None:
            layer.matmul = PlainProduct.__new__(PlainProduct)
    switch = accelerate(ours.engine.module, torch.float32, True, Tunings(tmp_path / "kernels.json"))
    ids = torch.randint(0, 80, (3, 4))
    for rows in (1, 3):
        for past in range(2):
            with switch.turned_on():
                found = logits(ours, ids[:rows], past, past + 1)
            wanted = logits(plain, ids[:rows], past, past + 1)
            assert (found - wanted).norm() < 1e-2 * wanted.norm(), (rows, past)


def as_on_a_gpu(layer: Linear) -> MatMul:
    """The plain product, which rounds activations where the kernels do."""
    plain, rounded = (kind(weight_of(layer)) for kind in (PlainProduct, RoundedProduct))
    float8 = plain.weight.layer.form == "float8"
    return lambda x, weight, bias: (rounded if float8 and x.shape[0] > FEW else plain)(x, weight, bias)


@pytest.mark.cuda
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_engines_decode_codes_in_graphs(quant: str, tied: bool, dtype: str, tmp_path: Path, plugins: Plugins) -> None:
    """Prompts and steps, captured and not, against the same engine on the CPU. In these types and at this size, other
    roundings alone are up to 0.04 apart, and 0.17 where activations are rounded to e4m3."""
    ours = session(quant, tmp_path, plugins, tied, dtype, device="cuda")
    eager = session(quant, tmp_path, plugins, tied, dtype, device="cuda", cuda_graphs=False)
    plain = session(quant, tmp_path, plugins, tied, dtype, native=False)
    assert isinstance(plain.engine, TorchExecutable)
    for layer in plain.engine.module.modules():
        if isinstance(layer, Linear) and layer.quantized is not None:
            layer.matmul = as_on_a_gpu(layer)
    for rows in (1, 3, 8):
        ids = torch.randint(0, 80, (rows, 24))
        for past, count in ((0, 20), (20, 21), (21, 22)):
            wanted = logits(plain, ids, past, count)
            tolerance = 0.25 if quant == "fp8" and rows * 20 > FEW else 6e-2
            for one in (ours, eager):
                found = logits(one, ids, past, count)
                assert (found - wanted).norm() < tolerance * wanted.norm(), (rows, past, count)
