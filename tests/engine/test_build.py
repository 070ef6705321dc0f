"""Building engines: what is checked before and while weights are read, and what a failure leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trtllm_core.checkpoint import open_checkpoint
from trtllm_core.config import BuildConfig, EngineConfig, ModelConfig
from trtllm_core.engine.build import build_engine, plan_engine
from trtllm_core.engine.directory import read_config
from trtllm_core.engine.shards import check_weight_map, rank_weights
from trtllm_core.errors import CheckpointError, ConfigError, PluginNotFoundError
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, Piece, Plugins, Weight
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.version import __version__


def change(checkpoint: Path, drop: str | None = None, **tensors: torch.Tensor) -> None:
    path = checkpoint / "model.safetensors"
    found = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file({**found, **tensors}, path)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# What is written


def test_directory_and_progress(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    seen: list[tuple[str, int, int]] = []
    build = BuildConfig(max_seq_len=64, max_input_len=40, tp_size=2)
    config = build_engine(
        checkpoint, tmp_path / "deep" / "engine", build, plugins=plugins, progress=lambda *args: seen.append(args)
    )
    path = tmp_path / "deep" / "engine"
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "rank0.safetensors", "rank1.safetensors"]
    assert config == read_config(path)
    assert [(rank.name, rank.bytes) for rank in config.ranks] == [
        (f"rank{rank}.safetensors", (path / f"rank{rank}.safetensors").stat().st_size) for rank in (0, 1)
    ]
    assert (config.family.name, config.family.distribution) == ("llama", "trtllm-plugin-llama")
    assert (config.backend.name, config.contract, config.source) == ("torch", "packed_paged", "hf")
    assert (config.core_version, config.vocab_size_padded) == (__version__, 68)
    for rank in ("rank 0", "rank 1"):
        steps = [(done, total) for what, done, total in seen if what == rank]
        assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["engine"]


def test_the_metadata_carries_the_config(engine: Path, checkpoint: Path) -> None:
    with safe_open(engine / "rank0.safetensors", "pt") as file:
        metadata = file.metadata()
    carried = EngineConfig.model_validate_json(metadata["engine"])
    assert carried == read_config(engine).replace(ranks=())
    assert metadata["rank"] == "0"


def test_the_parameters_are_the_checkpoint(engine: Path, checkpoint: Path) -> None:
    """safetensors' own reader reads what the streaming writer wrote."""
    source, made = load_file(checkpoint / "model.safetensors"), load_file(engine / "rank0.safetensors")
    layer = "model.layers.1."
    assert torch.equal(made["embedding.weight"], source["model.embed_tokens.weight"])
    assert torch.equal(made["head.weight"], source["lm_head.weight"])
    joined = torch.cat([source[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(made["layers.1.attention.qkv.weight"], joined)
    joined = torch.cat([source[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(made["layers.1.mlp.gate_up.weight"], joined)
    assert sum(tensor.numel() for tensor in made.values()) == sum(tensor.numel() for tensor in source.values())


def test_dtypes(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    for dtype in ("bfloat16", "float16"):
        build_engine(checkpoint, tmp_path / dtype, BuildConfig(dtype=dtype), plugins=plugins)
        made = load_file(tmp_path / dtype / "rank0.safetensors")
        assert {tensor.dtype for tensor in made.values()} == {getattr(torch, dtype)}
        source = load_file(checkpoint / "model.safetensors")["model.norm.weight"]
        assert torch.equal(made["norm.weight"], source.to(getattr(torch, dtype)))
    half = write_llama(tmp_path / "half", dtype=torch.bfloat16)
    assert build_engine(half, tmp_path / "kept", plugins=plugins).model.dtype == "bfloat16"


# Limits


def test_limits(checkpoint: Path, plugins: Plugins) -> None:
    opened = open_checkpoint(checkpoint)
    config, _, _ = plan_engine(opened, BuildConfig(), plugins)
    assert (config.build.max_seq_len, config.build.max_input_len) == (256, 255)
    with pytest.raises(ConfigError, match=r"max_seq_len \(300\) is beyond the 256 positions"):
        plan_engine(opened, BuildConfig(max_seq_len=300, max_input_len=200), plugins)
    with pytest.raises(ConfigError, match=r"max_input_len \(64\) must be below max_seq_len \(64\)"):
        BuildConfig(max_seq_len=64, max_input_len=64)


@pytest.mark.parametrize(("size", "message"), [(3, "cannot be shared out"), (8, "cannot be shared out")])
def test_heads_that_cannot_be_split(
    size: int, message: str, checkpoint: Path, tmp_path: Path, plugins: Plugins
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(checkpoint, tmp_path / "engine", BuildConfig(tp_size=size), plugins=plugins)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


# The weight map


def test_a_missing_tensor(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    change(checkpoint, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"lacks 'model.layers.1.mlp.up_proj.weight', which family 'llama' needs"):
        build_engine(checkpoint, tmp_path / "engine", plugins=plugins)


def test_tensors_left_over(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    extra = {f"model.layers.0.adapter{i}.weight": torch.ones(1) for i in range(7)}
    change(checkpoint, **extra)
    with pytest.raises(CheckpointError, match=r"does not know what to do with 'model.layers.0.adapter0.*and 2 more"):
        build_engine(checkpoint, tmp_path / "engine", plugins=plugins)


def test_a_tensor_of_another_shape(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    change(checkpoint, **{"model.norm.weight": torch.ones(31)})
    with pytest.raises(CheckpointError, match=r"parameter 'norm.weight' is \[32\] by the .* config, .* make \[31\]"):
        build_engine(checkpoint, tmp_path / "engine", plugins=plugins)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


class Wrong:
    """A family whose map was written carelessly."""

    def __init__(self, checkpoint: Path, plugins: Plugins, weights: Any) -> None:
        self.config, self.family, self.backend = plan_engine(open_checkpoint(checkpoint), BuildConfig(), plugins)
        self.change = weights

    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        made: Sequence[Weight] = self.change(list(self.family.weights(config, checkpoint)))
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda made: [*made, made[0]], "uses 'model.embed_tokens.weight' for more than one parameter"),
        (lambda made: made[1:], "does not know what to do with 'model.embed_tokens.weight'"),
    ],
)
def test_a_careless_map(wrong: Any, message: str, checkpoint: Path, plugins: Plugins) -> None:
    family: Any = Wrong(checkpoint, plugins, wrong)
    with pytest.raises(CheckpointError, match=message):
        check_weight_map(family, family.config.model, open_checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda made: made[1:], "lacks the module's parameters 'embedding.weight'"),
        (lambda made: [Weight("embeding.weight", made[0].pieces), *made[1:]], "gives 'embeding.weight' twice, or"),
        (lambda made: [*made, made[0]], "gives 'embedding.weight' twice, or"),
    ],
)
def test_a_map_that_is_not_the_module(
    wrong: Any, message: str, checkpoint: Path, tmp_path: Path, plugins: Plugins
) -> None:
    family: Any = Wrong(checkpoint, plugins, wrong)
    opened = open_checkpoint(checkpoint)
    parts = rank_weights(family.weights(family.config.model, opened), family.config.model, opened, TensorParallel())
    with pytest.raises(CheckpointError, match=message):
        family.backend.build(family.config, family.family, parts, tmp_path, 0, lambda what, done, total: None)


def test_transforms_see_the_whole_tensor(checkpoint: Path, plugins: Plugins) -> None:
    config, _, _ = plan_engine(open_checkpoint(checkpoint), BuildConfig(), plugins)
    piece = Piece("model.layers.0.mlp.down_proj.weight", "rows", lambda tensor: tensor.flip(0))
    opened = open_checkpoint(checkpoint)
    parts = [
        dict(rank_weights([Weight("w", (piece, piece))], config.model, opened, TensorParallel(rank, 2)))["w"]
        for rank in (0, 1)
    ]
    whole = opened.tensor(piece.source).flip(0)
    assert torch.equal(parts[0], whole[:16].repeat(2, 1))
    assert torch.equal(parts[1], whole[16:].repeat(2, 1))


# Plugins


def test_parts_of_a_fused_tensor(checkpoint: Path, plugins: Plugins) -> None:
    """One parameter may take a tensor in parts, each split by a rule of its own; it is read once."""
    config, _, _ = plan_engine(open_checkpoint(checkpoint), BuildConfig(), plugins)
    name, fused = "model.layers.0.self_attn.qkv", torch.arange(32 + 16 + 16.0)[:, None].expand(-1, 32)
    reads = []

    class Fused:
        def tensor(self, source: str) -> torch.Tensor:
            reads.append(source)
            return fused

    def part(first: int, count: int) -> Any:
        return lambda tensor: tensor[first : first + count]

    pieces = (
        Piece(name, "heads", part(0, 32)),
        Piece(name, "kv_heads", part(32, 16)),
        Piece(name, "kv_heads", part(48, 16)),
    )
    made = rank_weights([Weight("qkv", pieces)], config.model, Fused(), TensorParallel(1, 2))  # type: ignore[arg-type]
    ((_, rank1),) = made
    assert rank1[:, 0].tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]
    assert reads == [name]


def test_no_family(checkpoint: Path, tmp_path: Path, plugins: Plugins, without_llama: Plugins) -> None:
    with pytest.raises(PluginNotFoundError, match="pip install trtllm-plugin-llama"):
        build_engine(checkpoint, tmp_path / "engine", plugins=without_llama)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(PluginNotFoundError, match="NobodyForCausalLM"):
        build_engine(checkpoint, tmp_path / "engine", plugins=plugins)


# Failures


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_build(error: BaseException, engine: Path, checkpoint: Path, plugins: Plugins) -> None:
    """Leaves nothing behind, and the engine before it untouched."""
    before = snapshot(engine)

    def fail(what: str, done: int, total: int) -> None:
        if done == 5:
            raise error

    for target in (engine, engine.with_name("new")):
        with pytest.raises(type(error)):
            build_engine(checkpoint, target, BuildConfig(dtype="float16"), plugins=plugins, progress=fail)
    assert snapshot(engine) == before
    assert sorted(entry.name for entry in engine.parent.iterdir()) == ["engine", "hf"]


def test_a_move_that_fails(engine: Path, checkpoint: Path, plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = snapshot(engine), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == engine and not self.name.endswith("-old"):
            raise OSError("gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="gone"):
        build_engine(checkpoint, engine, plugins=plugins)
    assert snapshot(engine) == before
    assert sorted(entry.name for entry in engine.parent.iterdir()) == ["engine", "hf"]


def test_an_engine_is_replaced(engine: Path, checkpoint: Path, plugins: Plugins) -> None:
    (engine / "note.txt").write_text("old")
    build_engine(checkpoint, engine, BuildConfig(dtype="float16"), plugins=plugins)
    assert read_config(engine).model.dtype == "float16"
    assert sorted(file.name for file in engine.iterdir()) == ["config.json", "rank0.safetensors"]
    assert sorted(entry.name for entry in engine.parent.iterdir()) == ["engine", "hf"]


def test_nothing_else_is_replaced(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    """Not the checkpoint itself, nor a folder with somebody's work, nor a file; an empty folder is fine."""
    before = snapshot(checkpoint)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    for target in ("hf", "work", "file", "."):
        with pytest.raises(ConfigError, match="is there already and is no engine: remove it"):
            build_engine(checkpoint, tmp_path / target, plugins=plugins)
    assert snapshot(checkpoint) == before
    (tmp_path / "empty").mkdir()
    build_engine(checkpoint, tmp_path / "empty", plugins=plugins)
    assert read_config(tmp_path / "empty").model.family == "llama"
