"""The execution contexts of an engine: one for each profile, all of them working in one block of device memory."""

from __future__ import annotations

from typing import Any

from trtllm_core.backends.tensorrt.cuda import Cuda, DeviceBlock
from trtllm_core.backends.tensorrt.profiles import CONTEXT
from trtllm_core.errors import BackendError

ALIGNMENT = 256
"""Of the memory that a context is given, in bytes."""


class Contexts:
    """Makes contexts when they are first needed: none is switched between prefill and decoding.

    Contexts that share memory must not run at the same time, so a run on another stream than the last one's waits for
    that.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        engine: ``ICudaEngine``. Its budget for streamed weights is set already: it moves what contexts need.
        cuda: of the device.
        cache: ``IRuntimeCache`` of tensorrt_rtx; None: there is none.
        cuda_graph: have tensorrt_rtx capture the launches of profiles other than the context profile.
    """

    def __init__(self, trt: Any, engine: Any, cuda: Cuda, cache: Any = None, cuda_graph: bool = False) -> None:
        self._trt, self._engine, self._cuda, self._cache, self._cuda_graph = trt, engine, cuda, cache, cuda_graph
        self._contexts: dict[int, Any] = {}
        self._memory: DeviceBlock | None = None
        self._stream: int | None = None

    def order(self, stream: int) -> None:
        """What is run on this stream next comes after what was run before, on whatever stream that was."""
        if self._stream is not None and self._stream != stream:
            self._cuda.wait(stream, self._stream)
        self._stream = stream

    def get(self, profile: int, stream: int) -> Any:
        """The ``IExecutionContext`` of a profile."""
        if profile not in self._contexts:
            self._contexts[profile] = self._make(profile, stream)
        return self._contexts[profile]

    def _make(self, profile: int, stream: int) -> Any:
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._cache is not None:
            config.set_runtime_cache(self._cache)
        if self._cuda_graph and profile != CONTEXT and hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self._engine.create_execution_context(config)
        if context is None:
            raise BackendError("TensorRT could not make an execution context: the GPU's memory may not suffice")
        if not context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"TensorRT could not choose optimisation profile {profile}")
        memory = self._block()
        context.set_device_memory(memory.address, memory.size)
        return context

    def _block(self) -> DeviceBlock:
        """Enough for the most demanding profile, so that it never moves: captured graphs know its address."""
        if self._memory is None:
            self._memory = self._cuda.allocate(max(int(self._engine.device_memory_size_v2), ALIGNMENT))
        return self._memory
