"""What a TensorRT engine is made of: as its plan says, or where that cannot be read, as its build recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtllm_core.backends.linear.contract import cache_names
from trtllm_core.backends.linear.inspecting import graph_tensors
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.profiles import profile_shapes
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.config import EngineConfig
from trtllm_core.engine.weights import stored_tensors
from trtllm_core.plugin import Inspection, LayerGroup, StoredTensor, TensorSpec
from trtllm_core.plugin.inspection import group_layers


def inspect_plan(runtime: TensorRTRuntime, path: Path, config: EngineConfig) -> Inspection:
    """By the engine inspector, of a plan that could be deserialised."""
    told = runtime.inspect()
    return Inspection(
        f"the engine inspector of {runtime.library}",
        tuple(_spec(runtime, name) for name in (*runtime.inputs, *runtime.outputs)),
        group_layers(_named(json.loads(told).get("Layers", ()))),
        tuple(runtime.profiles),
        _weights(path, config),
        runtime.memory(),
        {"inspector": json.loads(told), "aliases": runtime.aliases},
    )


def inspect_record(path: Path, config: EngineConfig, why: str) -> Inspection:
    """By ``config.json`` and the files beside it."""
    record = config.record
    layers = sorted(record.get("layers", {}).items(), key=lambda item: (-item[1], item[0]))
    present, past = (cache_names(config.model.num_layers, prefix) for prefix in ("present", "past"))
    return Inspection(
        f"config.json, as the build recorded it; the plan itself cannot be read here: {why}",
        graph_tensors(config),
        tuple(LayerGroup(kind, count) for kind, count in layers),
        tuple(profile_shapes(config, TensorRTOptions(**config.build.options))),
        _weights(path, config),
        details={"aliases": dict(zip(present, past, strict=True))},
    )


def _weights(path: Path, config: EngineConfig) -> tuple[StoredTensor, ...]:
    """Those that lie beside the plan. What it has in itself only TensorRT can read."""
    for file in config.ranks:
        if file.name == path.name and file.companions:
            return stored_tensors(path.with_name(file.companions[0].name))
    return ()


def _named(layers: Any) -> Iterator[tuple[str, str]]:
    """Layers are objects, or of plans that were built with less to tell, names."""
    for layer in layers:
        if isinstance(layer, dict):
            yield str(layer.get("Name", "")), str(layer.get("LayerType", "unknown"))
        else:
            yield str(layer), "unknown"


def _spec(runtime: TensorRTRuntime, name: str) -> TensorSpec:
    dtype = str(runtime.dtypes[name]).removeprefix("torch.")
    shape = tuple(f"d{i}" if size < 0 else size for i, size in enumerate(runtime.shape(name)))
    if name not in runtime.inputs:
        return TensorSpec(name, dtype, shape, False)
    bounds = [profile[name] for profile in runtime.profiles]
    least = tuple(map(min, *(low for low, _, _ in bounds))) if len(bounds) > 1 else bounds[0][0]
    most = tuple(map(max, *(high for _, _, high in bounds))) if len(bounds) > 1 else bounds[0][2]
    return TensorSpec(name, dtype, shape, True, least, most)
