"""Products with packed weights: the instruction sets that they are compiled for, what is rounded, and their options."""

from __future__ import annotations

import mmap
import platform
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu import compiling
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.cpu.packed import PackedWeight, huge
from trtllm_core.backends.torch.cpu.product import PackedProduct, rounded
from trtllm_core.config import QuantizedLayer
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.quantize import QuantizedWeight, quantize
from trtllm_core.quantize.gguf import widened
from trtllm_core.session import Session

LESS = {"": (), "without AVX-512": ("-mno-avx512f",), "baseline": ("-march=x86-64",)}
"""Flags that leave out instructions of the machine that the tests run on."""


@pytest.fixture(params=LESS, ids=str)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if request.param and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags of x86")
    monkeypatch.setattr(compiling, "FLAGS", (*compiling.FLAGS, *LESS[request.param]))
    folder = cache_folder() / request.param  # libraries are cached by folder
    try:
        return Kernels(torch.float32, folder)
    except EngineUnsupportedError as error:
        pytest.skip(str(error))


def weights(bits: int, form: str, group: int, out: int = 37, inputs: int = 256) -> QuantizedWeight:
    made = QuantizedLayer(bits=bits, group_size=group, form="symmetric")  # type: ignore[arg-type]
    weight = quantize(torch.randn(out, inputs), made)
    weight.scales.copy_(weight.scales.half())  # as a file's are
    return widened(weight, made.replace(form="offsets")) if form == "offsets" else weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["symmetric", "offsets"])
def test_every_instruction_set(kernels: Kernels, bits: int, form: str) -> None:
    weight = weights(bits, form, 64)
    values = weight.dequantize().double()
    for rows in (1, 5):
        x = torch.randn(rows, 256)
        product = PackedProduct(weight, kernels, functional.linear, False)
        torch.testing.assert_close(product(x, x, None).double(), x.double() @ values.t(), rtol=1e-5, atol=1e-4)
        if kernels.multiplies_bytes:
            product = PackedProduct(weight, kernels, functional.linear, True)
            torch.testing.assert_close(product(x, x, None).double(), rounded(x) @ values.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_tables_come_back(kernels: Kernels, bits: int) -> None:
    weight = weights(bits, "offsets", 32)
    packed = PackedWeight(weight, 20 * 256)
    assert len(packed.pieces) > 1
    whole = torch.cat([kernels.dequantize(piece) for piece in packed.pieces])
    torch.testing.assert_close(whole, weight.dequantize(), rtol=1e-6, atol=1e-6)
    ids = torch.tensor([36, 0, 17], dtype=torch.int32)
    assert torch.equal(kernels.lookup(packed.whole, ids), whole[ids.long()])
    table = torch.randn(50, 24)
    assert torch.equal(kernels.copy_rows(table, ids), table[ids.long()])


def test_scales_that_float16_cannot_hold_stay(kernels: Kernels) -> None:
    weight = quantize(torch.randn(16, 64) * 1e-7, QuantizedLayer(bits=8, group_size=32, form="symmetric"))
    packed = PackedWeight(weight, 1 << 20)
    assert not packed.whole.halves
    assert torch.equal(kernels.dequantize(packed.whole), weight.dequantize())


def test_numbers_that_are_none_are_not_hidden(kernels: Kernels) -> None:
    """Rounded to integers they would look like any other."""
    weight = weights(4, "offsets", 32)
    for rounds in {False, kernels.multiplies_bytes}:
        product = PackedProduct(weight, kernels, functional.linear, rounds)
        for wrong in (float("nan"), float("inf")):
            x = torch.randn(2, 256)
            x[1, 77] = wrong
            y = product(x, x, None)
            assert y[0].isfinite().all()
            assert not y[1].isfinite().any()
        assert torch.equal(product(torch.zeros(1, 256), x, None), torch.zeros(1, 37))


def test_a_row_is_the_same_in_any_company(kernels: Kernels) -> None:
    weight = weights(4, "offsets", 32)
    x = torch.randn(8, 256)
    for rounds in {False, kernels.multiplies_bytes}:
        product = PackedProduct(weight, kernels, functional.linear, rounds)
        if rounds:  # integers and one order of blocks: to the bit
            alone = torch.cat([product(row, x, None) for row in x.split(1)])
            assert torch.equal(product(x, x, None), alone)


def test_large_pages_are_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Without)
    x = torch.arange(5)
    assert torch.equal(huge(x), x)


def test_who_cannot_round(load: Callable[..., Session]) -> None:
    with pytest.raises(EngineUnsupportedError, match="was asked for, but the engine's weights are not quantised"):
        load({"int8_activations": True})
