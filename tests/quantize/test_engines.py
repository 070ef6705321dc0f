"""Engines with quantised weights on the torch backend: built, loaded, and held against plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.cpu.product import DIRECT_UP_TO, PackedProduct, rounded
from trtllm_core.backends.torch.executable import TorchExecutable
from trtllm_core.backends.torch.quantized import PiecewiseProduct, RoundedProduct
from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig, QuantizationConfig, QuantizedLayer, SamplingConfig
from trtllm_core.config.quant_mode import QuantMode, quant_mode
from trtllm_core.engine.build import build_engine, plan_engine
from trtllm_core.engine.load import load_directory
from trtllm_core.engine.shards import check_weight_map, rank_weights
from trtllm_core.errors import ConfigError, EngineUnsupportedError
from trtllm_core.nn.quantized import PlainProduct, weight_of
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Piece, Plugins, Weight
from trtllm_core.quantize import QuantizedWeight, quantize
from trtllm_core.quantize.gguf import widened
from trtllm_core.runner import ModelRunner

PROMPTS = [[1, 5, 9, 33], [7, 60], [3, 2, 1, 4, 8, 6, 21, 22, 23, 24, 25]]


def limits(**more: Any) -> BuildConfig:
    fields = {"dtype": "float32", "max_seq_len": 64, "max_input_len": 40, "max_batch_size": 4, **more}
    if isinstance(fields.get("quantization"), str):
        fields["quantization"] = QuantizationConfig(weights=fields["quantization"])
    return BuildConfig(**fields)


def tokens(runner: ModelRunner) -> Any:
    return runner.generate(PROMPTS, sampling_config=SamplingConfig(max_new_tokens=12, end_id=66)).tolist()


def dense(engine: Path, plugins: Plugins) -> dict[str, torch.Tensor]:
    """The weights that an engine computes with, float32."""
    executable = load_directory(engine, plugins)
    assert isinstance(executable, TorchExecutable)
    module = executable.module
    found = {}
    for name, layer in module.named_modules():
        if getattr(layer, "quantized", None) is not None:
            found[f"{name}.weight"] = weight_of(layer).dequantize()
        elif isinstance(getattr(layer, "weight", None), torch.Tensor):
            found[f"{name}.weight"] = layer.weight
    return found


def test_a_gguf_keeps_its_values(quantised_gguf: Path, tmp_path: Path, plugins: Plugins) -> None:
    """Through fusion, the reordering of heads and both kinds of codes in one layer."""
    build_engine(quantised_gguf, tmp_path / "plain", limits(), plugins=plugins)
    config = build_engine(quantised_gguf, tmp_path / "kept", limits(quantization="keep"), plugins=plugins)
    assert config.quantization is not None
    assert len(config.quantization.layers) == 2 * 4 + 1  # all but the embedding
    plain, kept = dense(tmp_path / "plain", plugins), dense(tmp_path / "kept", plugins)
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    exact = {"plugins": plugins, "int8_activations": False}
    runners = [ModelRunner.from_dir(tmp_path / name, **exact) for name in ("plain", "kept")]
    assert [runner.quant_mode.has_any_quant() for runner in runners] == [False, True]
    results = [tokens(runner) for runner in runners]
    assert results[0] == results[1]
    twin = ModelRunner.from_dir(tmp_path / "kept", plugins=plugins, native=False)
    assert tokens(twin) == results[0]


def test_batch_invariant_engines_may_be_quantised(quantised_gguf: Path, tmp_path: Path, plugins: Plugins) -> None:
    build_engine(quantised_gguf, tmp_path / "kept", limits(quantization="keep"), plugins=plugins)
    runner = ModelRunner.from_dir(tmp_path / "kept", plugins=plugins, batch_invariant=True)
    assert tokens(runner) == tokens(ModelRunner.from_dir(tmp_path / "kept", plugins=plugins, int8_activations=False))


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_table_serves_as_head_and_embedding(
    tied: Path, tmp_path: Path, plugins: Plugins, weights: str, dtype: str
) -> None:
    config = build_engine(tied, tmp_path / "engine", limits(quantization=weights, dtype=dtype), plugins=plugins)
    assert config.quantization is not None
    assert config.quantization.layers["embedding"].bits == 8
    assert config.quantization.layers["layers.0.mlp.down"].bits == (4 if weights == "int4" else 8)
    assert tokens(ModelRunner.from_dir(tmp_path / "engine", plugins=plugins))


@pytest.mark.parametrize("weights", ["keep", "int4", "fp8"])
def test_ranks_share_the_codes(quantised_gguf: Path, plugins: Plugins, weights: str) -> None:
    """Each rank's codes are worth its share of the weights: rows of groups and of heads are split, no group is."""
    source = open_checkpoint(quantised_gguf)
    config, family, _ = plan_engine(source, limits(tp_size=2, quantization=weights), plugins)
    assert config.quantization is not None
    layers, maps = config.quantization.layers, check_weight_map(family, config.model, source)
    for rank in range(2):
        parallel = TensorParallel(rank, 2)
        plain = dict(rank_weights(maps, config.model, source, parallel))
        parts = dict(rank_weights(maps, config.model, source, parallel, config.quantization))
        for name, how in layers.items():
            made = {one: parts[f"{name}.{'weight' if one == 'codes' else one}"] for one in ("codes", "scales")}
            for one in ("zero_points", "offsets"):
                if f"{name}.{one}" in parts:
                    made[one] = parts[f"{name}.{one}"]
            found, wanted = QuantizedWeight.of(how, made).dequantize(), plain[f"{name}.weight"]
            if weights == "keep":
                assert torch.equal(found, wanted), name
            else:
                assert (found - wanted).abs().max() < 0.25 * wanted.abs().max(), name


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, QuantMode(0)),
        ({"quantization": "int4"}, QuantMode.INT4_WEIGHTS | QuantMode.INT8_WEIGHTS | QuantMode.PER_GROUP),
        ({"quantization": {"weights": "int8", "group_size": 0}}, QuantMode.INT8_WEIGHTS | QuantMode.PER_CHANNEL),
        ({"quantization": "fp8", "kv_dtype": "int8"}, QuantMode.FP8_QDQ | QuantMode.INT8_KV_CACHE),
        ({"kv_dtype": "fp8"}, QuantMode.FP8_KV_CACHE),
    ],
)
def test_the_classic_flags(checkpoint: Path, plugins: Plugins, fields: dict[str, Any], mode: QuantMode) -> None:
    config, _, _ = plan_engine(open_checkpoint(checkpoint), limits(**fields), plugins)
    assert quant_mode(config) == mode
    assert mode.has_any_quant(exclude_kv_cache=True) == ("quantization" in fields)
    assert mode.has_kv_cache_quant() == ("kv_dtype" in fields)


def test_what_codes_cannot_follow(quantised_gguf: Path, plugins: Plugins) -> None:
    source = open_checkpoint(quantised_gguf)
    config, _, _ = plan_engine(source, limits(quantization="keep"), plugins)
    piece = Piece("blk.0.ffn_down.weight", transform=lambda tensor: tensor.t())
    weights = [Weight("layers.0.mlp.down.weight", (piece,))]
    with pytest.raises(ConfigError, match="is transposed, .* round it anew"):
        list(rank_weights(weights, config.model, source, TensorParallel(), config.quantization))


def test_what_is_refused(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    source = open_checkpoint(checkpoint)
    fp8 = limits(quantization="fp8")
    wrong = [
        (fp8.replace(backend="onnxruntime"), "backend 'onnxruntime' takes no fp8 weights"),
        (fp8.replace(backend="tensorrt"), "backend 'tensorrt' takes no fp8 weights"),
        (fp8.replace(max_lora_rank=4), "adapters need weights in the engine's dtype"),
        (limits(quantization="keep"), "not quantised"),
        (limits(quantization="int4", max_lora_rank=4), "adapters need weights in the engine's dtype"),
        (limits(quantization={"weights": "int4", "group_size": 128}), "does not divide the 64 input features"),
        (limits(quantization="int4", tp_size=4), "does not divide the 16 input features.* or fewer ranks"),
    ]
    for build, says in wrong:
        with pytest.raises(ConfigError, match=says):
            plan_engine(source, build, plugins)


def kernels(dtype: torch.dtype) -> Kernels:
    try:
        return Kernels(dtype, cache_folder())
    except EngineUnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("bits", "form"), [(4, "symmetric"), (4, "zero_points"), (4, "offsets"), (8, "symmetric")])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_their_twin(bits: int, form: str, group: int, dtype: torch.dtype) -> None:
    made = QuantizedLayer(bits=bits, group_size=group, form="symmetric" if form == "offsets" else form)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(bits + group)
    weight = quantize(torch.randn(70, 256, generator=random), made)
    if form == "offsets":
        weight = widened(weight, made.replace(form="offsets"))
    bias = torch.randn(70, generator=random).to(dtype)
    twin, native, plain = PlainProduct(weight), kernels(dtype), torch.nn.functional.linear
    exact = (PackedProduct(weight, native, plain, False), PiecewiseProduct(weight, plain))
    for rows in (1, 3, 7, DIRECT_UP_TO + 1):
        x = torch.randn(rows, 256, generator=random).to(dtype)
        for product in exact:
            for b in (bias, None):
                wanted = twin(x.double(), weight.codes, None if b is None else b.double())
                assert_close(product(x, weight.codes, b), wanted, rounding=0.02)  # PyTorch's rounds weights too
        if native.multiplies_bytes and rows <= DIRECT_UP_TO:
            residual = torch.randn(rows, 70, generator=random).to(dtype)
            product, seen = PackedProduct(weight, native, plain, True), rounded(x)
            assert_close(product(x, weight.codes, bias), twin(seen, weight.codes, bias.double()))
            assert_close(product.add(x, residual, None), twin(seen, weight.codes, residual.double()))


def assert_close(found: torch.Tensor, wanted: torch.Tensor, rounding: float = 2**-8) -> None:
    """To the rounding of the result, and what sums of so many numbers lose."""
    bound = 1e-4 if found.dtype == torch.float32 else rounding * wanted.abs().max() + 1e-4
    assert (found.double() - wanted).abs().max() < bound


def test_rounded_activations_equal_their_numbers() -> None:
    """Rows of numbers that the type has, times a scale, are not changed by it; others are, by a sixteenth at most."""
    weight = quantize(torch.randn(24, 64), QuantizedLayer(bits=8, group_size=64, form="float8"))
    plain, rounded = PlainProduct(weight), RoundedProduct(weight)
    numbers = torch.randn(3, 64).to(torch.float8_e4m3fn).double()
    numbers[:, 0] = 448
    numbers *= torch.tensor([[1.0], [0.5], [8.0]])
    torch.testing.assert_close(rounded(numbers, weight.codes, None), plain(numbers, weight.codes, None))
    x = torch.randn(5, 64).double()
    difference = (rounded(x, weight.codes, None) - plain(x, weight.codes, None)).abs()
    assert difference.max() > 0
    assert (difference <= torch.nn.functional.linear(x.abs(), weight.dequantize().double().abs()) / 16).all()


def test_a_table_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtllm_core.backends.torch.quantized.PIECE", 64 * 7)
    monkeypatch.setattr("trtllm_core.backends.torch.cpu.product.PIECE", 64 * 7)
    weight = quantize(torch.randn(30, 64), QuantizedLayer(bits=4, group_size=32, form="zero_points"))
    x = torch.randn(20, 64)
    wanted = PlainProduct(weight)(x, weight.codes, None)
    for product in (
        PiecewiseProduct(weight, torch.nn.functional.linear),
        PackedProduct(weight, kernels(torch.float32), torch.nn.functional.linear, False),
    ):
        assert torch.allclose(product(x, weight.codes, None), wanted, atol=1e-4)
