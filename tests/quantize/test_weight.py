"""Rounding, and GGUF's own codes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core.config import QuantizationConfig, QuantizedLayer
from trtllm_core.errors import ConfigError
from trtllm_core.quantize import QuantizedWeight, float8_rows, from_gguf, part_shapes, plan_quantization, quantize
from trtllm_core.quantize.gguf import widened

FORMS = [(4, "symmetric"), (4, "zero_points"), (8, "symmetric")]


def how(bits: int, form: str, group: int = 32) -> QuantizedLayer:
    return QuantizedLayer(bits=bits, group_size=group, form=form)  # type: ignore[arg-type]


def blocks(stored: str, seed: int, rows: int = 5, groups: int = 3) -> np.ndarray:
    """Any bytes are a block, as long as scale and offset are finite."""
    kind = gguf.GGMLQuantizationType[stored]
    size, header = gguf.GGML_QUANT_SIZES[kind][1], 4 if stored == "Q4_1" else 2
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, groups, size), dtype=np.uint8)
    numbers = random.normal(size=(rows, groups, header // 2)) * 10.0 ** random.integers(-4, 3)
    raw[..., :header] = numbers.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.sampled_from(["Q4_0", "Q4_1", "Q8_0"]), st.integers(0, 2**32))
def test_codes_of_a_gguf_are_worth_what_gguf_says(stored: str, seed: int) -> None:
    raw = blocks(stored, seed)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[stored])
    weight = from_gguf(torch.from_numpy(raw), stored)
    assert {name: tuple(part.shape) for name, part in weight.parts().items()} == part_shapes(weight.layer, (5, 96))
    assert np.array_equal(weight.dequantize().numpy(), wanted)
    for form, bits in (("offsets", 8), ("offsets", weight.layer.bits), (weight.layer.form, 8)):
        wider = widened(weight, how(bits, form))
        assert np.array_equal(wider.dequantize().numpy(), wanted), (form, bits)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from([32, 64, 128]), st.integers(0, 2**32))
def test_rounding_is_within_half_a_step(form: tuple[int, str], group: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 2 * group, generator=random)
    weight[0, :group] = 0
    made = quantize(weight, how(*form, group))
    assert {name: tuple(part.shape) for name, part in made.parts().items()} == part_shapes(made.layer, (4, 2 * group))
    error = (made.dequantize() - weight).abs().view(4, 2, group)
    # Symmetric codes of 4 bits end at 7, so what lies opposite to the largest element may be a whole step off; a zero
    # point is itself rounded.
    most = 0.5 if form[0] == 8 else 1.0
    assert (error <= most * made.scales.abs()[..., None] * 1.0001).all()
    assert (made.dequantize()[0, :group] == 0).all()


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(1, 70), st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_numbers_of_8_bits_are_within_half_of_their_last_digit(size: int, spread: float, seed: int) -> None:
    """Three bits of mantissa; below the smallest exponent, steps of 2**-9."""
    weight = spread * torch.randn(4, size, generator=torch.Generator().manual_seed(seed))
    weight[1] = 0
    made = quantize(weight, how(8, "float8", size))
    assert {name: tuple(part.shape) for name, part in made.parts().items()} == part_shapes(made.layer, (4, size))
    error = (made.dequantize() - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, made.scales * 2.0**-10) * 1.0001).all()
    assert torch.equal(made.numbers().float().abs().amax((1, 2)), torch.tensor([448.0, 0, 448, 448]))
    assert (made.dequantize()[1] == 0).all()


def test_rows_that_are_rounded_keep_their_shape() -> None:
    x = torch.randn(2, 3, 16).bfloat16()
    numbers, scales = float8_rows(x)
    assert (numbers.shape, scales.shape, scales.dtype) == (x.shape, (2, 3, 1), torch.float32)
    assert torch.equal(float8_rows(x[1])[0].float(), numbers[1].float())


def test_rows_are_those_of_the_whole() -> None:
    for form in (*FORMS, (8, "float8")):
        weight = quantize(torch.randn(6, 64), how(*form, group=64 if form[1] == "float8" else 32))
        which = torch.tensor([[4, 0], [5, 5]])
        assert torch.equal(weight.dequantize(which), weight.dequantize()[which])


def test_parts_make_the_weight_again() -> None:
    weight = quantize(torch.randn(6, 96), how(4, "zero_points"))
    assert torch.equal(QuantizedWeight.of(weight.layer, weight.parts()).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weights": "int3"}, "'int4', 'int8', 'fp8' or 'keep'"),
        ({"weights": "int4", "group_size": 48}, "32, 64, 128"),
        ({"weights": "int4", "group_size": 0}, "32, 64, 128"),
        ({"weights": "int8", "symmetric": False}, "int8 codes are symmetric"),
        ({"weights": "int8", "head_bits": 4}, "goes with int4"),
        ({"weights": "keep", "group_size": 32}, "takes no group_size"),
        ({"weights": "fp8", "group_size": 32}, "one scale for each output feature"),
        ({"weights": "fp8", "symmetric": True}, "no zero points"),
        ({"weights": "fp8", "head_bits": 4}, "goes with int4"),
    ],
)
def test_wishes_that_cannot_be(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        QuantizationConfig(**fields)  # type: ignore[arg-type]


def plan(wish: QuantizationConfig, inputs: int = 64, *types: str) -> dict[str, QuantizedLayer]:
    layers, sources = {"body": (8, inputs), "head": (9, inputs)}, {"body": ["a", "b"], "head": ["c"]}
    stored = dict(zip("abc", types or ("F32",) * 3, strict=True))
    return plan_quantization(wish, layers, frozenset({"head"}), sources, stored.__getitem__).layers


def test_the_head_has_8_bits_unless_told_otherwise() -> None:
    found = plan(QuantizationConfig(weights="int4", symmetric=True))
    assert found == {"body": how(4, "symmetric"), "head": how(8, "symmetric")}
    assert plan(QuantizationConfig(weights="int4", head_bits=4))["head"].bits == 4
    assert "head" not in plan(QuantizationConfig(weights="int4", head_bits=16))
    assert plan(QuantizationConfig(weights="int8", group_size=0), 96)["body"] == how(8, "symmetric", 96)


def test_numbers_of_8_bits_have_a_scale_a_row() -> None:
    found = plan(QuantizationConfig(weights="fp8"), 96)
    assert found == {"body": how(8, "float8", 96), "head": how(8, "float8", 96)}
    assert plan(QuantizationConfig(weights="fp8", head_bits=16), 96) == {"body": how(8, "float8", 96)}


def test_what_is_kept() -> None:
    keep = QuantizationConfig(weights="keep")
    assert plan(keep, 64, "Q4_0", "Q4_1", "Q8_0") == {"body": how(4, "offsets"), "head": how(8, "symmetric")}
    assert plan(keep, 64, "Q8_0", "Q4_0", "F16") == {"body": how(8, "symmetric")}
    with pytest.raises(ConfigError, match="'body' is stored as 'Q4_K'"):
        plan(keep, 64, "Q4_0", "Q4_K", "F16")
    with pytest.raises(ConfigError, match="weights are not quantised"):
        plan(keep)


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="group_size 64 does not divide the 96 input features of 'body'"):
        plan(QuantizationConfig(weights="int4", group_size=64), 96)
