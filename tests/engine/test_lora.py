"""Engines for adapters: what a build records, and which adapters fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.checkpoint.peft import LoraPair, PeftAdapter
from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.engine.build import build_engine, plan_engine
from trtllm_core.engine.lora import lora_sizes, place_adapter
from trtllm_core.errors import CheckpointError, ConfigError
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import LowRank, ModelFamily, Piece, Plugins, Weight

LIMITS = BuildConfig(max_seq_len=64, max_lora_rank=4)
Planned = tuple[EngineConfig, ModelFamily]


@pytest.fixture
def plan(checkpoint: Path, plugins: Plugins) -> Callable[..., Planned]:
    def make(**limits: Any) -> Planned:
        return plan_engine(open_checkpoint(checkpoint), LIMITS.replace(**limits), plugins)[:2]

    return make


def adapter(scaling: float = 2.0, **shapes: tuple[int, int, int]) -> PeftAdapter:
    """``name=(in, out, rank)``; dots are written as ``__``, and a name without any is of layer 0's attention."""
    pairs = {}
    for name, (inputs, outputs, rank) in shapes.items():
        full = name.replace("__", ".") if "__" in name else f"model.layers.0.self_attn.{name}"
        pairs[full] = LoraPair(torch.randn(rank, inputs), torch.randn(outputs, rank), scaling)
    return PeftAdapter(Path("mine"), pairs)


def test_what_a_build_records(plan: Any) -> None:
    config, _ = plan()
    assert sorted(config.lora_layers) == sorted(
        f"layers.{i}.{name}"
        for i in (0, 1)
        for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    ), "the linear layers, and neither the embedding nor the head"
    qkv = config.lora_layers["layers.1.attention.qkv"]
    assert (qkv.inputs, qkv.rows) == (32, (32, 16, 16))
    assert config.lora_layers["layers.1.mlp.down"].inputs == 44
    assert plan(max_lora_rank=0)[0].lora_layers == {}


def test_an_engine_directory_carries_it(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    built = build_engine(checkpoint, tmp_path / "engine", LIMITS, plugins=plugins)
    assert built == EngineConfig.model_validate_json((tmp_path / "engine" / "config.json").read_text())
    assert built.lora_layers


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_factors_land_where_the_weights_do(rank: int, size: int, plan: Any) -> None:
    config, family = plan(tp_size=size)
    parallel = TensorParallel(rank, size)
    mine = adapter(
        v_proj=(32, 16, 3), q_proj=(32, 32, 2), model__layers__1__mlp__down_proj=(44, 32, 4),
        model__layers__1__mlp__up_proj=(32, 44, 1),
    )  # fmt: skip
    placed = place_adapter(mine, family, config, parallel)
    assert sorted(placed) == ["layers.0.attention.qkv", "layers.1.mlp.down", "layers.1.mlp.gate_up"]
    q, v = placed["layers.0.attention.qkv"]
    heads, kv_heads = parallel.span(4), parallel.kv_span(2)
    own_q, own_v = mine.pairs["model.layers.0.self_attn.q_proj"], mine.pairs["model.layers.0.self_attn.v_proj"]
    assert torch.equal(q.b, 2 * own_q.b[heads.start * 8 : heads.stop * 8])
    assert torch.equal(v.b, 2 * own_v.b[kv_heads.start * 8 : kv_heads.stop * 8])
    assert (q.start, v.start) == (0, 8 * (len(heads) + len(kv_heads)))
    assert torch.equal(q.a, own_q.a)
    (up,) = placed["layers.1.mlp.gate_up"]
    assert (up.start, len(up.b)) == (44 // size, 44 // size)
    (down,) = placed["layers.1.mlp.down"]
    share = parallel.span(44)
    assert torch.equal(down.a, mine.pairs["model.layers.1.mlp.down_proj"].a[:, share.start : share.stop])
    assert down.b.shape == (32, 4)
    sizes = lora_sizes(family, config, parallel)["layers.0.attention.qkv"]
    assert sizes == (8 * len(heads), 8 * len(kv_heads), 8 * len(kv_heads))


class Odd(ModelFamily):
    """Weights that are stored transposed, fused head by head, and in another order."""

    name, architectures = "odd", ("Odd",)

    def __init__(self, inner: ModelFamily) -> None:
        self._inner = inner

    def config(self, checkpoint: Any) -> Any:
        raise NotImplementedError

    def module(self, config: Any, parallel: Any) -> Any:
        return self._inner.module(config, parallel)

    def weights(self, config: Any, checkpoint: Any) -> list[Weight]:
        def part(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda weight: weight.t().unflatten(0, (4, 3, 8))[:, number].flatten(0, 1)

        fused = tuple(Piece("h.0.c_attn.weight", "heads", part(i)) for i in range(3))
        return [Weight("layers.0.attention.qkv.weight", fused)]


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_transforms_of_the_weight_map(rank: int, size: int, plan: Any) -> None:
    """The change of a weight, as the checkpoint stores it, gives the same parameter as the factors that were placed."""
    config, llama = plan(tp_size=size)
    family, parallel = Odd(llama), TensorParallel(rank, size)
    layer = {"inputs": 32, "rows": (32, 32, 32)}
    config = config.replace(lora_layers={"layers.0.attention.qkv": layer})
    mine = adapter(transformer__h__0__c_attn=(32, 96, 3))
    ((placed,),) = place_adapter(mine, family, config, parallel).values()
    (pair,) = mine.pairs.values()
    stored = (2 * pair.b @ pair.a).t()
    heads = stored.t().view(4, 3, 8, 32)[parallel.span(4).start : parallel.span(4).stop]
    torch.testing.assert_close(placed.b @ placed.a, heads.transpose(0, 1).reshape(-1, 32))
    assert placed.start == 0


@pytest.mark.parametrize(
    ("limits", "shapes", "error", "words"),
    [
        ({"max_lora_rank": 0}, {"q_proj": (32, 32, 2)}, ConfigError, "not built for LoRA adapters: .* max_lora_rank"),
        ({}, {"q_proj": (32, 32, 5)}, ConfigError, "mine has rank 5; .* max_lora_rank 4"),
        ({}, {"q_proj": (64, 32, 2)}, CheckpointError, "of another model: .* 64 features to 32, .* takes 32 to 32"),
        ({}, {"v_proj": (32, 32, 2)}, CheckpointError, "'model.layers.0.self_attn.v_proj' takes 32 features to 32"),
        ({}, {"z_proj": (32, 32, 2)}, CheckpointError, "changes 'model.layers.0.self_attn.z_proj', which is no linear"),
        ({}, {"lm__head": (32, 67, 2)}, CheckpointError, "'lm.head', which is no linear layer of this engine; it has"),
        (
            {"lora_target_modules": ("attn_q", "v_proj")},
            {"q_proj": (32, 32, 2), "k_proj": (32, 16, 2)},
            ConfigError,
            "changes 'k_proj'; the engine was built for lora_target_modules 'attn_q', 'v_proj'",
        ),
    ],
)
def test_adapters_that_do_not_fit(limits: Any, shapes: Any, error: Any, words: str, plan: Any) -> None:
    config, family = plan(**limits)
    with pytest.raises(error, match=words):
        place_adapter(adapter(**shapes), family, config, TensorParallel())


def test_targets(plan: Any) -> None:
    config, family = plan(lora_target_modules=("attn_q", "mlp.down_proj"))
    fits = adapter(q_proj=(32, 32, 2), model__layers__0__mlp__down_proj=(44, 32, 2))
    assert len(place_adapter(fits, family, config, TensorParallel())) == 2
    with pytest.raises(
        ConfigError, match="no linear layer called 'c_attn', 'lm_head'; it has 'down_proj', 'gate_proj'"
    ):
        plan(lora_target_modules=("c_attn", "q_proj", "lm_head"))
    with pytest.raises(ConfigError, match="need max_lora_rank"):
        BuildConfig(max_loras=2)
    with pytest.raises(ConfigError, match="need max_lora_rank"):
        BuildConfig(lora_target_modules=("q_proj",))


@pytest.mark.parametrize("field", ["max_lora_rank", "max_prompt_embedding_table_size"])
def test_backends_that_take_none(field: str, checkpoint: Path, plugins: Plugins) -> None:
    with pytest.raises(ConfigError, match=f"engines of backend 'onnxruntime' cannot have '{field}': leave it at 0"):
        plan_engine(open_checkpoint(checkpoint), BuildConfig(backend="onnxruntime", **{field: 4}), plugins)


@pytest.mark.parametrize("prefix", ["", "layers.0.", "model.model."])
def test_names_may_begin_otherwise(prefix: str, plan: Any) -> None:
    """Adapters of a bare model or of a larger one around it; what could be several layers is no layer's."""
    config, family = plan()
    full = "model.layers.0.self_attn.q_proj"
    name = {"": "layers.0.self_attn.q_proj", "layers.0.": "self_attn.q_proj", "model.model.": f"model.{full}"}[prefix]
    mine = PeftAdapter(Path("mine"), {name: LoraPair(torch.randn(2, 32), torch.randn(32, 2), 1.0)})
    if prefix == "layers.0.":
        with pytest.raises(CheckpointError, match="'self_attn.q_proj', which is no linear layer"):
            place_adapter(mine, family, config, TensorParallel())
    else:
        placed: Mapping[str, tuple[LowRank, ...]] = place_adapter(mine, family, config, TensorParallel())
        assert sorted(placed) == ["layers.0.attention.qkv"]
