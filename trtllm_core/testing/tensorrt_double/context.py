"""``IExecutionContext`` over ONNX Runtime, which insists on what TensorRT leaves undefined; and how one is made."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_core.testing import host_cuda
from trtllm_core.testing.tensorrt_double.types import (
    CudaGraphStrategy,
    ExecutionContextAllocationStrategy,
    TensorIOMode,
)

if TYPE_CHECKING:
    from trtllm_core.testing.tensorrt_double.engine import Engine


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
        sizes = self._engine.sizes(self._shapes)
        return tuple(sizes[part] if isinstance(part, str) else part for part in self._engine.symbols(name))

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
