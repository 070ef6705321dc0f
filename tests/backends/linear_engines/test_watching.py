"""Inner tensors in debug mode: an engine that was built to give them, on both backends of the linear contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core import GenerationSession, Plugins, SamplingConfig, Session, build_engine
from trtllm_core.backends.linear.watching import watched_modules
from trtllm_core.backends.tensorrt.executable import TensorRTExecutable
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.profiles import profile_shapes
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.errors import ConfigError
from trtllm_core.testing import tensorrt_double as double
from trtllm_core.testing.host_cuda import HostCuda

from .conftest import LIMITS, MakeGraph

GREEDY = SamplingConfig(max_new_tokens=4, end_id=())
NAMES = ("layers.*", "layers.0.mlp")
FOUND = {"layers.0", "layers.1", "layers.0.mlp"}


@pytest.fixture(scope="module")
def torch_runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, plugins: Plugins) -> Path:
    """What the torch backend's layers give."""
    place = tmp_path_factory.mktemp("torch")
    build_engine(checkpoint, place / "engine", LIMITS.replace(dtype="float32"), plugins=plugins)
    return written(Session.from_directory(place / "engine", plugins=plugins), plugins, place / "debug")


def written(session: Session, plugins: Plugins, folder: Path) -> Path:
    generation = GenerationSession(None, session, plugins=plugins, debug_mode=True, debug_dir=folder)
    generation.setup(2, 3, 4)
    generation.decode(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2]), GREEDY)
    return folder / "rank0"


def hold(ours: Path, theirs: Path, error: float) -> None:
    """Padded rows against packed ones."""
    for step, lengths in ((0, (3, 2)), (3, (1, 1))):
        for layer in ("layers.0", "layers.1"):
            packed = np.load(theirs / f"{layer}-step{step}.npy")
            padded = np.load(ours / f"{layer}-step{step}.npy")
            rows = np.concatenate([row[:length] for row, length in zip(padded, lengths, strict=True)])
            assert rows.shape == packed.reshape(rows.shape).shape
            assert np.abs(rows - packed.reshape(rows.shape)).max() < error * np.abs(packed).max()


def test_onnx_runtime(checkpoint: Path, torch_runs: Path, tmp_path: Path, plugins: Plugins) -> None:
    options = {"debug_tensors": NAMES, "verify": True}
    build = LIMITS.replace(dtype="float32", backend="onnxruntime", options=options)
    config = build_engine(checkpoint, tmp_path / "engine", build, plugins=plugins)
    assert config.record["verified"]["largest_error"] < 1e-5 * config.record["verified"]["largest_logit"]
    session = Session.from_directory(tmp_path / "engine", plugins=plugins)
    hold(written(session, plugins, tmp_path / "debug"), torch_runs, 1e-5)
    assert session.debug is not None
    assert session.debug.tensors.keys() >= FOUND
    assert session.debug.tensors["layers.0.mlp"].shape == session.debug.tensors["layers.0"].shape


def test_nobody_looks_and_nothing_is_given(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    build = LIMITS.replace(dtype="float32", backend="onnxruntime", options={"debug_tensors": NAMES})
    build_engine(checkpoint, tmp_path / "engine", build, plugins=plugins)
    session = Session.from_directory(tmp_path / "engine", plugins=plugins)
    generation = GenerationSession(None, session, plugins=plugins)
    generation.setup(1, 3, 4)
    generation.decode(torch.tensor([[5, 6, 7]]), torch.tensor([3]), GREEDY)
    assert not FOUND & session._executable.debug_tensors().keys()


def test_tensorrt_s_double(checkpoint: Path, torch_runs: Path, make_graph: MakeGraph, tmp_path: Path) -> None:
    graph = make_graph("lower_right", "float32", checkpoint, debug_tensors=NAMES)
    plan = double.serialise(graph.path, list(profile_shapes(graph.config, TensorRTOptions())))
    runtime = TensorRTRuntime(double, plan, HostCuda())
    assert {*runtime.outputs} - {*runtime.aliases} == {"logits", *FOUND}
    session = Session.from_engine(TensorRTExecutable(graph.config, runtime, torch.device("cpu")))
    hold(written(session, Plugins.load(), tmp_path / "debug"), torch_runs, 1e-5)


@pytest.mark.usefixtures("trt")
def test_tensorrt_builds_it(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    """The network has the outputs, passes its checks, and its graph's bytes compute the same logits as ever."""
    options: Any = {"debug_tensors": NAMES, "verify": True}
    build = LIMITS.replace(dtype="float16", backend="tensorrt", options=options)
    record = build_engine(checkpoint, tmp_path / "engine", build, plugins=plugins).record
    assert record["verified"]["largest_error"] < 5e-3 * record["verified"]["largest_logit"]


def test_what_cannot_be_watched(checkpoint: Path, tmp_path: Path, plugins: Plugins) -> None:
    for pattern, says in (("layers.*.brain", "no such module; it begins with"), ("head", "does not belong to tokens")):
        build = LIMITS.replace(dtype="float32", backend="onnxruntime", options={"debug_tensors": (pattern,)})
        with pytest.raises(ConfigError, match=says):
            build_engine(checkpoint, tmp_path / "engine", build, plugins=plugins)


def test_a_star_ends_at_a_dot() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())})
    assert watched_modules(module, ["a.*"]) == ("a.0", "a.1")
    assert watched_modules(module, ["*"]) == ("a",)
