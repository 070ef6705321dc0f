"""What of CUDA the run-time needs beside TensorRT: memory, the order of streams, captured graphs.

Streams are raw handles, as callers of ``Session.run`` have them; 0 is the default stream.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trtllm_core.errors import BackendError

Enqueue = Callable[[int], None]
"""Enqueues work on the stream that it is given."""
Launch = Callable[[int], None]
"""Launches a captured graph on a stream."""


@dataclass(frozen=True)
class DeviceBlock:
    """Device memory, as long as this lives."""

    address: int
    size: int
    owner: Any


class Cuda(Protocol):
    """One device."""

    def current(self) -> int:
        """The stream that PyTorch works on now."""

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Have PyTorch work on a stream."""

    def allocate(self, size: int) -> DeviceBlock:
        """Memory, aligned to 256 bytes at least."""

    def wait(self, stream: int, before: int) -> None:
        """What is enqueued on ``stream`` from now on runs after all that is enqueued on ``before`` so far."""

    def capture(self, enqueue: Enqueue) -> Launch:
        """Capture what ``enqueue`` enqueues, and run none of it.

        Raises:
            BackendError: it does what cannot be captured.
        """


class TorchCuda:
    """By PyTorch, which is there in any case."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> int:
        """See ``Cuda``."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """See ``Cuda``."""
        if stream == self.current():
            return contextlib.nullcontext()
        return torch.cuda.stream(self._stream(stream))

    def allocate(self, size: int) -> DeviceBlock:
        """See ``Cuda``."""
        block = torch.empty(size, dtype=torch.uint8, device=self._device)
        return DeviceBlock(block.data_ptr(), size, block)

    def wait(self, stream: int, before: int) -> None:
        """See ``Cuda``."""
        self._stream(stream).wait_stream(self._stream(before))

    def capture(self, enqueue: Enqueue) -> Launch:
        """See ``Cuda``."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.graph(graph, stream=side):
                enqueue(int(side.cuda_stream))
        except RuntimeError as error:
            raise BackendError(f"the engine's execution cannot be captured in a CUDA graph: {error}") from error

        def launch(stream: int) -> None:
            with self.on(stream):
                graph.replay()

        return launch

    def _stream(self, stream: int) -> torch.cuda.Stream:
        if not stream:
            return torch.cuda.default_stream(self._device)
        return torch.cuda.ExternalStream(stream, device=self._device)  # type: ignore[no-untyped-call]


class CoreCuda(TorchCuda):
    """By ``cuda.core``, of the package cuda-python: memory and graphs outside of PyTorch's pools.

    PyTorch's capture keeps a memory pool for each graph and collects garbage before it; TensorRT allocates nothing
    while it runs, and needs neither.
    """

    def __init__(self, device: torch.device, core: Any) -> None:
        super().__init__(device)
        self._core = core
        self._place = core.Device(device.index or 0)
        self._place.set_current()

    def allocate(self, size: int) -> DeviceBlock:
        """See ``Cuda``."""
        buffer = self._place.allocate(size, stream=self._place.default_stream)
        self._place.sync()  # it was allocated in the order of another stream than those that will use it
        return DeviceBlock(int(buffer.handle), size, buffer)

    def capture(self, enqueue: Enqueue) -> Launch:
        """See ``Cuda``."""
        side = self._place.create_stream()
        builder = side.create_graph_builder()
        builder.begin_building("thread_local")
        try:
            enqueue(int(side.handle))
        finally:
            builder.end_building()
        graph = builder.complete()

        def launch(stream: int) -> None:
            handle = self._core.Stream.from_handle(stream) if stream else self._place.default_stream
            graph.launch(handle)

        return launch


def cuda_of(device: torch.device) -> Cuda:
    """The device's, by ``cuda.core`` where that is installed."""
    for name in ("cuda.core", "cuda.core.experimental"):  # as versions before 1.0 called it
        with contextlib.suppress(ImportError):
            core = importlib.import_module(name)
            if hasattr(core, "Device"):
                return CoreCuda(device, core)
    return TorchCuda(device)
