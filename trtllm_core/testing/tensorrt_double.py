"""A stand-in for TensorRT's run-time API that executes an engine's own ONNX graph with ONNX Runtime, in CPU memory.

It is passed where the module ``tensorrt`` or ``tensorrt_rtx`` is, and insists on what those insist on in silence: every
address set, updated caches at the address of the caches, shapes inside the profile that the context has. So all code
between the generation loop and TensorRT runs in tests without a GPU, on the same bytes that an engine is built of. What
it cannot show is what TensorRT itself computes.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_core.backends.onnxruntime.executable import open_session
from trtllm_core.testing import host_cuda

__name__ = "tensorrt_double"  # what messages call it
__version__ = "11.1.0"

float32, float16, bfloat16, int64, int32, int8, uint8 = (
    np.dtype(name) for name in ("float32", "float16", "V2", "int64", "int32", "int8", "uint8")
)
bool = np.dtype("bool")  # noqa: A001 - as the module names it
_OF_ONNX = {"tensor(float)": float32, "tensor(float16)": float16, "tensor(int64)": int64, "tensor(int32)": int32}

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class TensorIOMode(enum.Enum):
    """Whether a tensor is an input or an output."""

    INPUT = 1
    OUTPUT = 2


class EngineValidity(enum.Enum):
    """What ``Runtime.get_engine_validity`` answers."""

    VALID = 0
    INVALID = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    """Who gives a context its memory."""

    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class EngineInvalidityDiagnostics(enum.IntFlag):
    """Why an engine is invalid."""

    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class CudaGraphStrategy(enum.Enum):
    """As tensorrt_rtx has it."""

    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class LayerInformationFormat(enum.Enum):
    """How the inspector answers."""

    JSON = 1


class Logger:
    """Takes a severity, and logs nothing."""

    ERROR = 1
    WARNING = 2

    def __init__(self, severity: int = WARNING) -> None:
        self.severity = severity


def serialise(
    graph: Path, profiles: Sequence[Mapping[str, Bounds]], version: str = __version__, streamable: int = 0
) -> bytes:
    """What stands for a serialised engine: where its graph is, its profiles, and bytes of weights to stream."""
    told = {"graph": str(graph), "profiles": list(profiles), "version": version, "streamable": streamable}
    return json.dumps(told).encode()


class Runtime:
    """Reads what ``serialise`` wrote."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def get_engine_validity(self, plan: Any) -> tuple[EngineValidity, int]:
        """Invalid where another version wrote it, or it is damaged."""
        try:
            version = json.loads(bytes(plan))["version"]
        except ValueError:
            return EngineValidity.INVALID, EngineInvalidityDiagnostics.MALFORMED_ENGINE
        if version != __version__:
            return EngineValidity.INVALID, EngineInvalidityDiagnostics.VERSION_MISMATCH
        return EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        """The engine; None where the bytes are none."""
        try:
            told = json.loads(bytes(plan))
        except ValueError:
            return None
        return Engine(Path(told["graph"]), told["profiles"], told["streamable"])


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
        return _OF_ONNX[self._all[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 where a size is not fixed."""
        return tuple(size if isinstance(size, int) else -1 for size in self._all[name].shape)

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


class RuntimeConfig:
    """``IRuntimeConfig`` of tensorrt_rtx."""

    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    allocation_strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        """Who gives the context its memory."""
        self.allocation_strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        """A cold one."""
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> None:
        """Use it."""
        self.cache = cache


class RuntimeCache:
    """``IRuntimeCache``: bytes that come back as they were given."""

    content = b"compiled"

    def serialize(self) -> bytes:
        """What to keep."""
        return self.content

    def deserialize(self, content: bytes) -> None:
        """What was kept."""
        self.content = content


class Inspector:
    """``EngineInspector``: the graph's nodes stand for layers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get_engine_information(self, form: LayerInformationFormat) -> str:
        """JSON, as of a plan that was built with detailed verbosity."""
        import onnx

        nodes = onnx.load(self._engine.graph, load_external_data=False).graph.node
        return json.dumps({"Layers": [{"Name": node.name, "LayerType": node.op_type} for node in nodes]})


class Context:
    """``IExecutionContext``."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self._engine, self.config, self.profile = engine, config, 0
        self._memory: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._settled: dict[str, tuple[int, ...]] | None = None
        """Shapes of the last execution that was not captured."""

    def set_optimization_profile_async(self, profile: int, stream: int) -> Any:
        """Which profile's shapes it takes."""
        assert not host_cuda.capturing(stream), "a profile is chosen while its stream is captured"
        if not 0 <= profile < self._engine.num_optimization_profiles:
            return False
        self.profile, self._shapes, self._memory = profile, {}, None
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        """What the context works in."""
        managed = self.config.allocation_strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        assert managed, "a context that has its own memory is given some"
        assert memory % 256 == 0, "device memory is not aligned to 256 bytes"
        assert size >= self._engine.get_device_memory_size_for_profile_v2(self.profile), "too little device memory"
        self._memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> Any:
        """False where the profile does not admit it."""
        least, _, most = self._engine.get_tensor_profile_shape(name, self.profile)
        fits = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        if fits:
            self._shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, address: int) -> Any:
        """Where a tensor's bytes are."""
        self._addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        """Inputs whose shape is not known."""
        return [one.name for one in self._engine.session.get_inputs() if one.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an input as set, of an output as it follows."""
        if name in self._shapes:
            return self._shapes[name]
        source = self._engine.get_aliased_input_tensor(name)
        if source is not None:
            return self._shapes[source]
        return (*self._shapes["logit_indices"], self._engine.get_tensor_shape(name)[-1])

    def execute_async_v3(self, stream: int) -> Any:
        """Run now, or where the stream is captured, later. Raises AssertionError for what TensorRT leaves undefined."""
        if self.config.allocation_strategy == ExecutionContextAllocationStrategy.USER_MANAGED:
            assert self._memory is not None, "a context whose memory is the user's has none"
            host_cuda.use_memory(self._memory[0], stream)
        if host_cuda.capturing(stream):
            assert self._settled == self._shapes, "shapes are captured that were not run before"
        else:
            self._settled = dict(self._shapes)
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        host_cuda.enqueue(stream, lambda: self._execute(shapes, addresses))
        return True

    def _execute(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        engine, binding = self._engine, self._engine.session.io_binding()
        current, self._shapes = self._shapes, dict(shapes)
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            assert name in addresses, f"{name} has no address"
            source = engine.get_aliased_input_tensor(name)
            assert source is None or addresses[name] == addresses[source], f"{name} is not {source} in place"
            bind = binding.bind_input if engine.get_tensor_mode(name) == TensorIOMode.INPUT else binding.bind_output
            bind(name, "cpu", 0, engine.get_tensor_dtype(name), self.get_tensor_shape(name), addresses[name])
        self._shapes = current
        _check_writes(shapes, addresses)
        engine.session.run_with_iobinding(binding)


def _check_writes(shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
    (batch, tokens), capacity = shapes["input_ids"], shapes["past_key_0"][2]
    write = np.ctypeslib.as_array(ctypes.cast(addresses["write_indices"], ctypes.POINTER(ctypes.c_int64)), (batch,))
    assert (write >= 0).all(), "a row is written before its cache"
    assert (write + tokens <= capacity).all(), "a row is written beyond its cache"
