"""Loading engines: every road gives the same logits without copying a mapped file, and says what does not fit."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtllm_core.config import FORMAT_VERSION, BuildConfig
from trtllm_core.engine.build import build_engine
from trtllm_core.engine.directory import read_config
from trtllm_core.engine.load import load_directory, load_engine
from trtllm_core.engine.weights import Weights, map_file, read_metadata, write_weights
from trtllm_core.errors import (
    ConfigError,
    EngineCorruptError,
    EngineError,
    EngineUnsupportedError,
    EngineVersionError,
    PluginNotFoundError,
)
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Executable, Plugins
from trtllm_core.session import Session
from trtllm_core.testing.packed import prefill_and_decode

CPU = torch.device("cpu")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]


def logits(executable: Executable) -> torch.Tensor:
    return torch.cat(prefill_and_decode(executable, PROMPTS, 2))


# The roads in


def test_all_roads_give_the_same_logits(engine: Path, plugins: Plugins) -> None:
    path = engine / "rank0.safetensors"
    expected = logits(load_directory(engine, plugins))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), map_file(path), memoryview(mapped)]
    for source in sources:
        executable = load_engine(source, plugins)
        assert executable.config == read_config(engine).replace(ranks=())
        assert torch.equal(logits(executable), expected), type(source)
    assert torch.equal(logits(Session.from_serialized_engine(path, plugins=plugins).engine), expected)
    assert torch.equal(logits(Session.from_engine(load_directory(engine, plugins)).engine), expected)


def pointers(executable: Executable) -> list[tuple[int, int]]:
    parameters = executable.module.parameters()  # type: ignore[attr-defined]
    return [(parameter.data_ptr(), parameter.nbytes) for parameter in parameters]


def test_a_mapping_is_not_copied(engine: Path, plugins: Plugins) -> None:
    buffer = map_file(engine / "rank0.safetensors")
    start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    for at, size in pointers(load_engine(buffer, plugins)):
        assert start < at <= at + size <= start + len(buffer)


def mappings(path: Path) -> list[range]:
    """Where this process has a file mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]


def test_a_path_is_mapped_and_not_copied(engine: Path, plugins: Plugins) -> None:
    path = engine / "rank0.safetensors"
    executable = load_engine(path, plugins)
    found = pointers(executable)
    assert found
    assert all(any(at in where and at + size - 1 in where for where in mappings(path)) for at, size in found)


def test_tensors_are_aligned(engine: Path, plugins: Plugins) -> None:
    """The writer pads its header, so that vector loads do not straddle cache lines at every step."""
    buffer = map_file(engine / "rank0.safetensors")
    assert torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 64 == 0
    header = 8 + int.from_bytes(buffer[:8], "little")
    assert header % 64 == 0


# Streaming weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_and_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a": torch.randn(7),
        "scalar": torch.tensor(2.0),
        "ü": torch.randn(2, 1, 4),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    path = tmp_path / "w.safetensors"
    write_weights(path, shapes, dtype, reversed(tensors.items()), {"engine": '{"x": "ü"}'})
    theirs = load_file(path)
    for ours in (Weights(source, CPU).tensors for source in (path, map_file(path), path.read_bytes())):
        assert ours.keys() == theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(theirs[name], tensor.to(dtype))
            assert torch.equal(ours[name], theirs[name])
    assert read_metadata(path) == read_metadata(path.read_bytes()) == {"engine": '{"x": "ü"}'}


def test_a_transposed_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor, path = torch.randn(6, 4), tmp_path / "w.safetensors"
    write_weights(path, {"w": (4, 6)}, torch.float32, [("w", tensor.T)], {})
    assert torch.equal(load_file(path)["w"], tensor.T)


# What does not fit


def edit(engine: Path, **fields: Any) -> None:
    config = json.loads((engine / "config.json").read_text())
    (engine / "config.json").write_text(json.dumps({**config, **fields}))


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no directory": (shutil.rmtree, EngineError, "holds no engine: config.json is not there"),
    "no config": (lambda e: (e / "config.json").unlink(), EngineError, "holds no engine: config.json is not there"),
    "no JSON": (lambda e: (e / "config.json").write_text("{"), EngineCorruptError, "config.json is not valid JSON"),
    "no text": (lambda e: (e / "config.json").write_bytes(b"\xff{"), EngineCorruptError, "is not valid JSON"),
    "a list": (lambda e: (e / "config.json").write_text("[]"), EngineCorruptError, "it has no format_version"),
    "a model's config": (
        lambda e: (e / "config.json").write_text("{}"),
        EngineCorruptError,
        "it has no format_version",
    ),
    "of TensorRT-LLM": (
        lambda e: (e / "config.json").write_text('{"version": "0.10.0", "pretrained_config": {}, "build_config": {}}'),
        EngineUnsupportedError,
        "of an engine of TensorRT-LLM, which only the release that built it can run: build one .* trtllm-core build",
    ),
    "of an older TensorRT-LLM": (
        lambda e: (e / "config.json").write_text('{"builder_config": {}, "plugin_config": {}}'),
        EngineUnsupportedError,
        "of an engine of TensorRT-LLM",
    ),
    "a word for a number": (lambda e: edit(e, format_version="one"), EngineCorruptError, "it has no format_version"),
    "newer format": (
        lambda e: edit(e, format_version=FORMAT_VERSION + 1, core_version="9.9", novelty=1),
        EngineVersionError,
        f"engine format {FORMAT_VERSION + 1}, written by trtllm-core 9.9; .* up to {FORMAT_VERSION}: pip install -U",
    ),
    "unknown field": (lambda e: edit(e, novelty=1), EngineCorruptError, "config.json: .*it has no field 'novelty'"),
    "missing field": (lambda e: edit(e, model={}), EngineCorruptError, "config.json: .*model"),
    "no rank file": (lambda e: (e / "rank0.safetensors").unlink(), EngineCorruptError, "rank0.safetensors is missing"),
    "truncated": (lambda e: cut(e / "rank0.safetensors", 999), EngineCorruptError, "has 999 bytes where .* truncated"),
    "grown": (lambda e: cut(e / "rank0.safetensors", 10**6), EngineCorruptError, "has 1000000 bytes where config.json"),
    "missing family": (
        lambda e: edit(e, family={"name": "mamba", "distribution": "trtllm-plugin-mamba", "version": "1"}),
        PluginNotFoundError,
        "pip install trtllm-plugin-mamba",
    ),
    "missing backend": (
        lambda e: edit(e, backend={"name": "tpu", "distribution": "trtllm-backend-tpu", "version": "1"}),
        PluginNotFoundError,
        "pip install trtllm-backend-tpu",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(damage: str, engine: Path, plugins: Plugins) -> None:
    inflict, error, message = DAMAGES[damage]
    inflict(engine)
    with pytest.raises(error, match=message):
        load_directory(engine, plugins)


def test_without_the_family(engine: Path, without_llama: Plugins) -> None:
    for load in (
        lambda: load_directory(engine, without_llama),
        lambda: load_engine(engine / "rank0.safetensors", without_llama),
    ):
        with pytest.raises(PluginNotFoundError, match="pip install trtllm-plugin-llama"):
            load()


@pytest.mark.parametrize("rank", [1, -1])
def test_a_rank_that_is_not_there(rank: int, engine: Path, plugins: Plugins) -> None:
    with pytest.raises(ConfigError, match=f"has ranks 0 to 0; rank {rank} is not one of them"):
        load_directory(engine, plugins, rank)


def test_ranks_are_not_mixed_up(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    """The files of two ranks are of one shape: only what is written in them tells them apart."""
    path = tmp_path / "two"
    build_engine(checkpoint, path, BuildConfig(tp_size=2), plugins=plugins)
    assert load_directory(path, plugins, 1, parallel=TensorParallel(1, 2)).weight_bytes()
    for file, parallel in ((0, TensorParallel(1, 2)), (1, TensorParallel(0, 2)), (0, TensorParallel())):
        with pytest.raises(ConfigError, match=f"engine of rank {file} of 2, but parallel says rank {parallel.rank}"):
            load_directory(path, plugins, file, parallel=parallel)
    # Without a process group a rank still knows which it is, and says what is lacking when it has to communicate.
    executable = load_engine(path / "rank1.safetensors", plugins)
    with pytest.raises(ConfigError, match="rank 1 of 2 has joined no process group"):
        logits(executable)


def test_weights_of_another_model(engine: Path, plugins: Plugins) -> None:
    path = engine / "rank0.safetensors"
    metadata, tensors = read_metadata(path), load_file(path)
    wrong = {
        "a shape": {**tensors, "layers.1.mlp.down.weight": torch.zeros(32, 43)},
        "a dtype": {**tensors, "layers.1.mlp.down.weight": tensors["layers.1.mlp.down.weight"].half()},
        "one less": {name: tensor for name, tensor in tensors.items() if name != "layers.1.mlp.down.weight"},
    }
    for weights in wrong.values():
        save_file(weights, path, metadata)
        with pytest.raises(EngineCorruptError, match=r"do not fit its config, first at 'layers.1.mlp.down.weight'"):
            load_engine(path, plugins)


@pytest.mark.parametrize("share", [0.9, 0.1])
def test_truncated_bytes(share: float, engine: Path, plugins: Plugins) -> None:
    whole = (engine / "rank0.safetensors").read_bytes()
    part = whole[: int(len(whole) * share)]
    with pytest.raises(EngineCorruptError, match="truncated"):
        load_engine(part, plugins)
    (engine / "part.safetensors").write_bytes(part)
    with pytest.raises(EngineCorruptError, match="cannot be read"):
        load_engine(engine / "part.safetensors", plugins)


def test_a_header_cut_short(engine: Path, plugins: Plugins) -> None:
    with pytest.raises(EngineCorruptError, match="no whole safetensors header: it was truncated"):
        load_engine((engine / "rank0.safetensors").read_bytes()[:200], plugins)


def test_what_is_no_engine(engine: Path, plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"ONNX or anything else")
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    for source in (
        tmp_path / "other",
        b"",
        b"ONNX or anything else",
        tmp_path / "plain",
        (tmp_path / "plain").read_bytes(),
    ):
        with pytest.raises(EngineError, match="no engine of any installed backend"):
            load_engine(source, plugins)
    for missing in (tmp_path / "nothing", str(engine)):
        with pytest.raises(EngineError, match="is not there"):
            load_engine(missing, plugins)


def test_a_newer_engine_in_bytes(engine: Path, plugins: Plugins) -> None:
    path = engine / "rank0.safetensors"
    config = json.loads(read_metadata(path)["engine"])
    save_file(load_file(path), path, {"engine": json.dumps({**config, "format_version": FORMAT_VERSION + 1})})
    with pytest.raises(EngineVersionError, match="pip install -U trtllm-core"):
        load_engine(path, plugins)


def test_a_newer_core_is_told(engine: Path, plugins: Plugins) -> None:
    edit(engine, core_version="99.0")
    with pytest.warns(UserWarning, match="built by trtllm-core 99.0, newer than this"):
        load_directory(engine, plugins)
