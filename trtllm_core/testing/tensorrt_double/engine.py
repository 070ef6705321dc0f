"""``ICudaEngine`` over a graph in ONNX Runtime, and the inspector of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_core.backends.onnxruntime.executable import open_session
from trtllm_core.testing.tensorrt_double.context import Context, RuntimeConfig
from trtllm_core.testing.tensorrt_double.types import OF_ONNX, Bounds, LayerInformationFormat, TensorIOMode


class Engine:
    """``ICudaEngine``."""

    def __init__(self, graph: Path, profiles: Sequence[Mapping[str, Bounds]], streamable: int = 0) -> None:
        self.graph = graph
        self.session = open_session(graph)
        self._inputs = {one.name: one for one in self.session.get_inputs()}
        self._outputs = {one.name: one for one in self.session.get_outputs()}
        self._all = self._inputs | self._outputs
        self._profiles = profiles
        self.num_io_tensors = len(self._all)
        self.num_optimization_profiles = len(profiles)
        self.streamable_weights_size, self._budget = streamable, 0
        self.contexts: list[Context] = []
        """All that were made."""

    def get_tensor_name(self, index: int) -> str:
        """Inputs first."""
        return str(list(self._all)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        """Input or output."""
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        """As this module names types."""
        return OF_ONNX[self._all[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 where a size is not fixed."""
        return tuple(size if isinstance(size, int) else -1 for size in self._all[name].shape)

    def symbols(self, name: str) -> list[int | str]:
        """The shape as the graph has it, with names of sizes that are not fixed. Not of TensorRT."""
        return list(self._all[name].shape)

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """What those names are worth where inputs have these shapes. Not of TensorRT."""
        pairs = (zip(self.symbols(name), shape, strict=True) for name, shape in shapes.items())
        return {part: size for pair in pairs for part, size in pair if isinstance(part, str)}

    def get_aliased_input_tensor(self, name: str) -> str | None:
        """Which input an updated cache is the update of."""
        return name.replace("present_", "past_") if name.startswith("present_") else None

    def get_tensor_profile_shape(self, name: str, profile: int) -> Bounds:
        """Smallest, usual, largest."""
        fixed = self.get_tensor_shape(name)
        least, usual, most = self._profiles[profile].get(name, (fixed, fixed, fixed))
        return tuple(least), tuple(usual), tuple(most)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        """Of activations: here so many bytes as tokens in the profile's largest batch, whole pages of 256."""
        rows, tokens = self.get_tensor_profile_shape("input_ids", profile)[2]
        return -(-rows * tokens // 256) * 256

    @property
    def device_memory_size_v2(self) -> int:
        """Of the most demanding profile."""
        return max(map(self.get_device_memory_size_for_profile_v2, range(self.num_optimization_profiles)))

    @property
    def weight_streaming_budget_v2(self) -> int:
        """Bytes of weights that stay on the GPU."""
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert not self.contexts, "the budget is set while there are contexts"
        assert 0 <= budget <= self.streamable_weights_size, "the budget is more than there is"
        self._budget = budget

    def get_weight_streaming_automatic_budget(self) -> int:
        """What TensorRT proposes: here half."""
        return self.streamable_weights_size // 2

    def create_runtime_config(self) -> RuntimeConfig:
        """``IRuntimeConfig``."""
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Context:
        """``IExecutionContext``, on profile 0."""
        self.contexts.append(Context(self, config))
        return self.contexts[-1]

    def create_engine_inspector(self) -> Inspector:
        """``EngineInspector``."""
        return Inspector(self)


class Inspector:
    """``EngineInspector``: the graph's nodes stand for layers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get_engine_information(self, form: LayerInformationFormat) -> str:
        """JSON, as of a plan that was built with detailed verbosity."""
        import onnx

        nodes = onnx.load(self._engine.graph, load_external_data=False).graph.node
        return json.dumps({"Layers": [{"Name": node.name, "LayerType": node.op_type} for node in nodes]})
