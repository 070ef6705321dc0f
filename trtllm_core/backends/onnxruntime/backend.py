"""The ONNX Runtime backend: a graph that runs wherever ONNX does, and its weights as safetensors beside it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtllm_core.backends.modules import fill, meta_module, parameter_shapes
from trtllm_core.config import EngineConfig
from trtllm_core.engine.weights import Weights, places, write_weights
from trtllm_core.errors import ConfigError, EngineUnsupportedError, listing
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Availability, Backend, BuiltRank, ModelFamily
from trtllm_core.plugin.backend import Progress

if TYPE_CHECKING:
    from trtllm_core.backends.onnxruntime.executable import OnnxRuntimeExecutable


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
        from trtllm_core.backends.linear.export import GraphOptions, export_module, write_graph

        _check_build(config)
        dtype, device = getattr(torch, config.model.dtype), torch.device("cpu")
        module = meta_module(config, family, TensorParallel())
        file = directory / f"rank{rank}.safetensors"
        write_weights(file, parameter_shapes(module), dtype, weights, {"engine": config.model_dump_json()})
        fill(module, config, Weights(file, device).tensors, device)
        path = file.with_suffix(".onnx")
        options = GraphOptions(dialect="onnx", attention="mask", bounded=True)
        write_graph(export_module(module, config, options, file.name, places(file)), path)
        return BuiltRank(path, (file,), {"onnxruntime": version("onnxruntime"), "onnx": version("onnx")})

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


def _check_build(config: EngineConfig) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"building needs {listing(missing)}: pip install trtllm-core[onnxruntime]")
    if config.build.tp_size != 1:
        raise ConfigError("the onnxruntime backend runs on one rank: leave tp_size at 1")
    if config.model.dtype == "bfloat16":
        raise ConfigError("ONNX Runtime has no bfloat16 on the CPU: build with dtype float32 or float16")
    if config.kv_dtype != config.model.dtype:
        raise ConfigError(
            f"the onnxruntime backend keeps keys and values in the engine's dtype, {config.model.dtype}: "
            "leave kv_dtype out"
        )
