"""Runs of an engine as CUDA graphs, where the module does not capture them by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from trtllm_core.backends.tensorrt.cuda import Cuda, Launch

MOST = 32
"""Graphs that are kept; the one that was used least recently goes."""

Tensors = Mapping[str, torch.Tensor]
Key = tuple[tuple[str, tuple[int, ...], int], ...]


@dataclass(frozen=True)
class _Captured:
    inputs: dict[str, torch.Tensor]
    """A step's own inputs, where the graph reads them."""
    outputs: dict[str, torch.Tensor]
    launch: Launch


class CapturedRuns:
    """A graph for each shape and each place of what stays in place: caches and weights.

    What is new in every step (the inputs in int64, and the outputs) is copied to and from buffers of the graph's own.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._graphs: OrderedDict[Key, _Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self, inputs: Tensors, outputs: Tensors, stream: int, enqueue: Callable[[Tensors, Tensors, int], None]
    ) -> None:
        """Replay the graph of these shapes and places, or make it.

        The first run is an ordinary one: TensorRT settles a shape's state when it is first enqueued, and what is
        captured must find it settled.
        """
        steps = {name: tensor for name, tensor in inputs.items() if tensor.dtype == torch.int64}
        key = tuple(
            (name, tuple(tensor.shape), 0 if name in steps else tensor.data_ptr()) for name, tensor in inputs.items()
        )
        found = self._graphs.get(key)
        if found is None:
            self._graphs[key] = self._capture(inputs, steps, outputs, stream, enqueue)
            if len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
            return
        self._graphs.move_to_end(key)
        with self._cuda.on(stream):
            for name, tensor in steps.items():
                found.inputs[name].copy_(tensor, non_blocking=True)
            found.launch(stream)
            for name, tensor in found.outputs.items():
                outputs[name].copy_(tensor, non_blocking=True)

    def _capture(
        self,
        inputs: Tensors,
        steps: Tensors,
        outputs: Tensors,
        stream: int,
        enqueue: Callable[[Tensors, Tensors, int], None],
    ) -> _Captured:
        with self._cuda.on(stream):
            own = {name: tensor.clone() for name, tensor in steps.items()}
            results = {name: torch.empty_like(tensor) for name, tensor in outputs.items()}
            enqueue({**inputs, **own}, results, stream)
            for name, tensor in results.items():
                outputs[name].copy_(tensor, non_blocking=True)
        launch = self._cuda.capture(lambda side: enqueue({**inputs, **own}, results, side))
        return _Captured(own, results, launch)
