"""What is told of a plan that can be read, and of a GPU that is there: the double in TensorRT's place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtllm_core.backends.tensorrt import backend, diagnosing
from trtllm_core.backends.tensorrt.diagnosing import capability_problem, diagnose
from trtllm_core.backends.tensorrt.inspecting import inspect_plan
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.profiles import profile_shapes
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.config import EngineConfig
from trtllm_core.errors import EngineUnsupportedError
from trtllm_core.plugin import Plugins
from trtllm_core.testing import tensorrt_double as double
from trtllm_core.testing.host_cuda import HostCuda

from .conftest import MakeGraph


def test_a_plan_that_can_be_read(make_graph: MakeGraph) -> None:
    graph = make_graph("lower_right", "float32")
    profiles = list(profile_shapes(graph.config, TensorRTOptions()))
    found = inspect_plan(
        TensorRTRuntime(double, double.serialise(graph.path, profiles), HostCuda()), graph.path, graph.config
    )
    assert found.told_by == "the engine inspector of tensorrt_double 11.1.0"
    assert found.profiles == tuple(profiles)
    (spec,) = (one for one in found.tensors if one.name == "input_ids")
    assert (spec.minimum, spec.maximum) == ((1, 1), (4, 48))
    assert {group.kind: group.count for group in found.layers}["TensorScatter"] == 4
    assert found.memory == {"profile 0": 4 * 48 + 64, "profile 1": 256, "streamable weights": 0}
    assert found.details["aliases"]["present_value_1"] == "past_value_1"


@pytest.mark.parametrize(
    ("module", "capability", "message"),
    [
        ("tensorrt_rtx", (9, 0), "does not support GPUs of compute capability 9.0; build for the module tensorrt"),
        ("tensorrt_rtx", (7, 0), "does not support GPUs of compute capability 7.0"),
        ("tensorrt", (7, 0), "does not support"),
        ("tensorrt", (9, 0), None),
        ("tensorrt_rtx", (12, 0), None),
        ("tensorrt_rtx", (8, 9), None),
    ],
)
def test_which_gpus_a_module_supports(module: str, capability: tuple[int, int], message: str | None) -> None:
    found = capability_problem(module, capability)
    assert (found is None) == (message is None)
    assert message is None or message in str(found)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, make_graph: MakeGraph) -> None:
    """PyTorch says that there is one, of capability 8.9, and TensorRT is the double."""
    make_graph("lower_right", "float32")  # while PyTorch still says that there is none: export asks it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(diagnosing, "load_library", lambda module: double)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_the_module_does_not_support(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the plan is read. On another the plan is read, and one that is cut is refused."""
    graph = make_graph("lower_right", "float32")
    path = tmp_path / "rank0.engine"
    path.write_bytes(double.serialise(graph.path, [])[:-9])
    config = graph.config.replace(record={"module": "tensorrt_rtx", "version": double.__version__})
    family = Plugins.load().model_families.get("llama").load()()
    rtx = SimpleNamespace(**vars(double) | {"__name__": "tensorrt_rtx"})
    monkeypatch.setattr(backend, "load_library", lambda module: rtx)
    monkeypatch.setattr(backend, "cuda_of", lambda device: HostCuda())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(
        EngineUnsupportedError, match="cannot run here: tensorrt_rtx does not support .* 9.0; build for"
    ):
        backend.TensorRTBackend().load(path, config, family)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    with pytest.raises(EngineUnsupportedError, match="tensorrt_rtx 11.1.0 cannot run this engine .* truncated"):
        backend.TensorRTBackend().load(path, config, family)


@pytest.mark.usefixtures("gpu")
def test_findings_on_a_machine_with_a_gpu(
    make_graph: MakeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = make_graph("lower_right", "float32")
    record = {"module": "tensorrt_rtx", "version": double.__version__}
    path = tmp_path / "rank0.engine"

    def levels(plan: bytes, **options: Any) -> list[tuple[str, str]]:
        path.write_bytes(plan)
        config: EngineConfig = graph.config.replace(record=record)
        config = config.replace(build=config.build.replace(options=options))
        return [(one.level, one.found) for one in diagnose(path, config)]

    whole = double.serialise(graph.path, [])
    assert [level for level, _ in levels(whole)] == ["ok", "ok", "ok"]
    assert "damaged or truncated" in levels(whole[:-9])[2][1]
    assert "of another version" in levels(double.serialise(graph.path, [], version="11.0.0"))[2][1]
    assert levels(whole, compute_capabilities=("12.0",))[1][0] == "problem"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    level, why = levels(whole)[1]
    assert level == "problem"
    assert "compute capability 9.0" in why
