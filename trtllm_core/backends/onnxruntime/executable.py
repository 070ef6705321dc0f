"""An ONNX engine, loaded in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from trtllm_core.backends.linear.executable import LinearExecutable
from trtllm_core.config import EngineConfig
from trtllm_core.errors import EngineCorruptError
from trtllm_core.plugin.kv_policy import KVPlan

ENTRIES_STEP = 64
"""Attention looks at a multiple of this many cache entries, as few as hold the longest row."""


class OnnxRuntimeExecutable(LinearExecutable):
    """Runs a graph of the padded, linear contract over caches in place: past and present are one buffer."""

    own_threads = True

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        threads: int | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(config, torch.device("cpu"), ("float32", "float16"))
        self._session = open_session(path, threads)
        names = {one.name for one in self._session.get_inputs()}
        self._bounded = "cache_entries" in names
        self._weights = {name: tensor for name, tensor in (weights or {}).items() if name in names}
        """Of graphs that take weights as inputs."""
        self._grouped = config.record.get("attention") == "grouped"
        self._entries = torch.arange(config.build.max_seq_len)
        contract = {"logits", *self.present}
        self._watched = [one.name for one in self._session.get_outputs() if one.name not in contract]
        self._binding: Any = None
        self._place: tuple[int, int, bool] | None = None
        """Address and rows of the caches that are bound, and whether what is watched is."""

    def allocate_kv(self, plan: KVPlan) -> int:
        """See ``Executable``."""
        self._binding = self._place = None  # it holds the addresses of the caches that were
        return super().allocate_kv(plan)

    def launch(
        self,
        inputs: Mapping[str, torch.Tensor],
        longest: int,
        caches: Sequence[torch.Tensor],
        logits: torch.Tensor,
        stream: int,
    ) -> None:
        """See ``LinearExecutable``."""
        rows, tokens = inputs["input_ids"].shape
        if self._grouped and rows > 1 and tokens > 1 and int(inputs["write_indices"].max()) > 0:
            # ONNX Runtime's kernel takes several tokens of several rows only where all caches are empty.
            found = []
            for row in range(rows):
                one = slice(row, row + 1)
                part = {name: tensor[one] for name, tensor in inputs.items()}
                found.append(self._run(part, longest, [cache[one] for cache in caches], logits[one]))
            self.watched = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        else:
            self.watched = self._run(inputs, longest, caches, logits)

    def _run(
        self, inputs: Mapping[str, torch.Tensor], longest: int, caches: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns what is watched, while somebody looks: outputs that are not bound are not given."""
        binding = self._bound(caches)
        for name, tensor in inputs.items():
            _bind(binding.bind_input, name, tensor)
        if self._bounded:
            _bind(binding.bind_input, "cache_entries", self._entries[: -(-longest // ENTRIES_STEP) * ENTRIES_STEP])
        _bind(binding.bind_output, "logits", logits)
        watched = self._watched if self.debugging else []
        for name in watched:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()[-len(watched) :] if watched else []  # in the order in which they were bound
        return {name: torch.from_numpy(value.numpy()) for name, value in zip(watched, values, strict=True)}

    def _bound(self, caches: Sequence[torch.Tensor]) -> Any:
        """A binding of what stays: weights, and the caches until a run has other rows of them."""
        place = caches[0].data_ptr(), caches[0].shape[0], self.debugging
        if place != self._place:
            self._binding, self._place = self._session.io_binding(), place
            for name, tensor in self._weights.items():
                _bind(self._binding.bind_input, name, tensor)
            for past, present, cache in zip(self.past, self.present, caches, strict=True):
                _bind(self._binding.bind_input, past, cache)
                _bind(self._binding.bind_output, present, cache)
        return self._binding

    def weight_bytes(self) -> int:
        """See ``Executable``."""
        return sum(file.total_bytes for file in self.config.ranks)


def open_session(path: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Raises:
        EngineCorruptError: the graph or its weights cannot be read.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Graphs for TensorRT dequantise before they multiply. Fused, the two would round activations to int8 as well.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Threads wait actively between the products of a run, and not between runs, where others want the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = threads or torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of several classes, which share no base
        raise EngineCorruptError(f"ONNX Runtime cannot load {path}: {error}") from error


_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


def _bind(bind: Any, name: str, tensor: torch.Tensor) -> None:
    bind(name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
