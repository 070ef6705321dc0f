"""The ONNX Runtime backend: a graph that runs wherever ONNX does, and its weights as safetensors beside it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from trtllm_core.backends.linear.limits import check_limits
from trtllm_core.config import Config, EngineConfig
from trtllm_core.errors import ConfigError, EngineUnsupportedError, listing
from trtllm_core.plugin import Availability, Backend, BuiltRank, ModelFamily
from trtllm_core.plugin.backend import Progress

if TYPE_CHECKING:
    from trtllm_core.backends.onnxruntime.executable import OnnxRuntimeExecutable


class OnnxRuntimeOptions(Config):
    """``BuildConfig.options``."""

    verify: bool = Field(default=False, description="hold the graph against the torch backend, and record the errors")


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    contract = "padded_linear"

    def probe(self) -> Availability:
        """See ``Backend``."""
        try:
            return Availability(True, "CPU", version("onnxruntime"))
        except PackageNotFoundError:
            return Availability(False, "ONNX Runtime is not installed; pip install trtllm-core[onnxruntime]")

    def build(
        self,
        config: EngineConfig,
        family: ModelFamily,
        weights: Iterable[tuple[str, torch.Tensor]],
        directory: Path,
        rank: int,
        progress: Progress,
    ) -> BuiltRank:
        """See ``Backend``: ``rank{rank}.onnx``, and its weights in ``rank{rank}.safetensors``.

        Raises:
            ConfigError: the build asks for what this backend does not do.
            CheckpointError: the weights do not make up the family's module.
        """
        from trtllm_core.backends.linear.export import GraphOptions
        from trtllm_core.backends.linear.judge import graph_errors
        from trtllm_core.backends.linear.writing import write_weights_and_graph

        options = _check_build(config)
        file = directory / f"rank{rank}.safetensors"
        form = GraphOptions(dialect="onnx", attention="mask", bounded=True)
        path, _ = write_weights_and_graph(config, family, weights, file, form)
        record: dict[str, Any] = {"onnxruntime": version("onnxruntime"), "onnx": version("onnx")}
        if options.verify:
            record["verified"] = graph_errors(path, file, config, family)
        return BuiltRank(path, (file,), record)

    def load(
        self,
        source: Path | bytes | memoryview,
        config: EngineConfig,
        family: ModelFamily,
        *,
        threads: int | None = None,
        **unknown: Any,
    ) -> OnnxRuntimeExecutable:
        """See ``Backend``. ``threads`` is how many run a step; None takes PyTorch's number.

        Raises:
            ConfigError: an unknown option.
            EngineUnsupportedError: the engine is not a file: its weights lie beside it.
            EngineCorruptError: the graph or its weights cannot be read.
        """
        from trtllm_core.backends.onnxruntime.executable import OnnxRuntimeExecutable

        if unknown:
            raise ConfigError(f"the onnxruntime backend has no option {listing(unknown)}")
        if not isinstance(source, Path):
            raise EngineUnsupportedError("an onnxruntime engine is loaded by its path: its weights lie beside it")
        return OnnxRuntimeExecutable(config, source, threads)


def _check_build(config: EngineConfig) -> OnnxRuntimeOptions:
    check_limits(config, ("onnx", "onnxscript", "onnxruntime"), "pip install trtllm-core[onnxruntime]")
    if config.model.dtype == "bfloat16":
        raise ConfigError("ONNX Runtime has no bfloat16 on the CPU: build with dtype float32 or float16")
    return OnnxRuntimeOptions(**config.build.options)
