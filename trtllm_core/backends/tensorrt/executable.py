"""A TensorRT engine as an ``Executable``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from trtllm_core.backends.linear.executable import LinearExecutable
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.config import EngineConfig
from trtllm_core.plugin import TensorSpec


class TensorRTExecutable(LinearExecutable):
    """Runs a TensorRT engine over linear caches in place."""

    def __init__(
        self,
        config: EngineConfig,
        runtime: TensorRTRuntime,
        device: torch.device,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(config, device, ("float32", "float16", "bfloat16"))
        self.runtime = runtime
        self.tensors = tuple(_within(spec, runtime) for spec in self.tensors)
        self._weights = dict(weights or {})
        """Inputs that are weights: engines of one shape may share them."""
        fresh = [name for name in runtime.outputs if name not in runtime.aliases and name != "logits"]
        self._inner = {name: runtime.shape(name)[2:] for name in fresh}
        """Sizes after rows and tokens of what was built to be watched: the engine writes it in every run."""

    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """See ``LinearExecutable``. Inputs are copied to the GPU on the run's own stream, 0 being PyTorch's current."""
        stream = stream or self.runtime.cuda.current()
        with self.runtime.cuda.on(stream):
            super().execute(inputs, outputs, stream)

    def launch(
        self,
        inputs: Mapping[str, torch.Tensor],
        longest: int,
        caches: Sequence[torch.Tensor],
        logits: torch.Tensor,
        stream: int,
    ) -> None:
        """See ``LinearExecutable``."""
        feed = {**self._weights, **inputs, **dict(zip(self.past, caches, strict=True))}
        places = tuple(inputs["input_ids"].shape)
        if any(tensor.shape[:2] != places for tensor in self.watched.values()) or not self.watched:
            self.watched = {
                name: torch.empty(*places, *sizes, dtype=self.runtime.dtypes[name], device=self.device)
                for name, sizes in self._inner.items()
            }
        self.runtime.run(feed, {"logits": logits, **self.watched}, stream, not self.debugging)

    def weight_bytes(self) -> int:
        """See ``Executable``."""
        return sum(file.total_bytes for file in self.config.ranks)


def _within(spec: TensorSpec, runtime: TensorRTRuntime) -> TensorSpec:
    """A step's tensor within what the engine's profiles admit."""
    if spec.name not in runtime.inputs or not runtime.profiles:
        return spec
    most = tuple(map(max, zip(*(profile[spec.name][2] for profile in runtime.profiles), strict=True)))
    return replace(spec, maximum=most)
