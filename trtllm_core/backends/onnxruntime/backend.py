"""The ONNX Runtime backend: a graph that runs wherever ONNX does, and its weights as safetensors beside it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from packaging.version import Version
from pydantic import Field

from trtllm_core.backends.linear.limits import check_limits
from trtllm_core.config import Config, EngineConfig
from trtllm_core.engine.weights import stored_tensors
from trtllm_core.errors import ConfigError, EngineCorruptError, EngineUnsupportedError, listing
from trtllm_core.plugin import Availability, Backend, BuiltRank, Finding, Inspection, ModelFamily
from trtllm_core.plugin.backend import Progress

if TYPE_CHECKING:
    from trtllm_core.backends.onnxruntime.executable import OnnxRuntimeExecutable


class OnnxRuntimeOptions(Config):
    """``BuildConfig.options``."""

    verify: bool = Field(default=False, description="hold the graph against the torch backend, and record the errors")
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        default=4, description="of products with quantised weights: 4 rounds activations to int8, 1 computes in float32"
    )
    debug_tensors: tuple[str, ...] = Field(
        default=(), description="modules, such as layers.*, whose outputs debug_mode keeps"
    )


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    contract = "padded_linear"
    gives = frozenset({"multi_position"})
    takes = frozenset({"quantization", "zero_points", "offsets", "tables"})

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
        form = GraphOptions(
            "onnxruntime", "grouped", accuracy_level=options.accuracy_level, debug_tensors=options.debug_tensors
        )
        path, kind = write_weights_and_graph(config, family, weights, file, form)
        record: dict[str, Any] = {"onnxruntime": version("onnxruntime"), "onnx": version("onnx"), "attention": kind}
        if config.quantization is not None:
            record["accuracy_level"] = options.accuracy_level
        if options.verify:
            record["verified"] = graph_errors(path, file, config.replace(record=record), family)
        return BuiltRank(path, (file,), record)

    def load(
        self,
        source: Path | bytes | memoryview,
        config: EngineConfig,
        family: ModelFamily,
        *,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        **unknown: Any,
    ) -> OnnxRuntimeExecutable:
        """See ``Backend``. ``threads`` is how many run a step; None takes PyTorch's number.

        Raises:
            ConfigError: an unknown option, or a device other than the CPU.
            EngineUnsupportedError: the engine is not a file: its weights lie beside it.
            EngineCorruptError: the graph or its weights cannot be read.
        """
        from trtllm_core.backends.onnxruntime.executable import OnnxRuntimeExecutable

        if unknown:
            raise ConfigError(f"the onnxruntime backend has no option {listing(unknown)}")
        if torch.device(device).type != "cpu":
            raise ConfigError(f"onnxruntime engines run on the CPU, not on {str(device)!r}")
        if not isinstance(source, Path):
            raise EngineUnsupportedError("an onnxruntime engine is loaded by its path: its weights lie beside it")
        return OnnxRuntimeExecutable(config, source, threads)

    def inspect(self, path: Path, config: EngineConfig, family: ModelFamily) -> Inspection:
        """See ``Backend``: the layers are the graph's nodes."""
        from trtllm_core.backends.linear.inspecting import graph_layers, graph_tensors, read_graph

        return Inspection(
            "the ONNX graph, and the header of the weights' file beside it",
            graph_tensors(config),
            graph_layers(read_graph(path)),
            weights=stored_tensors(path.with_suffix(".safetensors")),
        )

    def diagnose(self, path: Path, config: EngineConfig) -> list[Finding]:
        """See ``Backend``: the graph against its contract and its weights, and versions."""
        from trtllm_core.backends.linear.inspecting import graph_problems, read_graph

        if not self.probe().available:
            return []  # which was told already
        built, running = config.record.get("onnxruntime"), version("onnxruntime")
        findings = [_compare(built, running)]
        if find_spec("onnx") is None:
            return [*findings, Finding("warning", path.name, "not looked into: pip install onnx")]
        try:
            problems = graph_problems(read_graph(path), path.parent, config)
        except EngineCorruptError as error:
            problems = [str(error)]
        if problems:
            findings.append(Finding("problem", path.name, "; ".join(problems) + "; build the engine again"))
        else:
            findings.append(Finding("ok", path.name, "a graph of the padded, linear contract, all its weights there"))
        return findings


def _compare(built: str | None, running: str) -> Finding:
    if built == running:
        return Finding("ok", "onnxruntime", f"{running}, as when it was built")
    if built is not None and Version(built) > Version(running):
        cure = f"pip install onnxruntime=={built} if it cannot be loaded"
        return Finding("warning", "onnxruntime", f"built with {built}, and the older {running} is installed; {cure}")
    return Finding("ok", "onnxruntime", f"{running}; built with {built}, whose graphs it reads")


def _check_build(config: EngineConfig) -> OnnxRuntimeOptions:
    check_limits(config, ("onnx", "onnxscript", "onnxruntime"), "pip install trtllm-core[onnxruntime]")
    if config.model.dtype == "bfloat16":
        raise ConfigError("ONNX Runtime has no bfloat16 on the CPU: build with dtype float32 or float16")
    layers = {} if config.quantization is None else config.quantization.layers
    for name, layer in layers.items():
        if layer.group_size & (layer.group_size - 1):
            raise ConfigError(
                f"ONNX Runtime's quantised groups are powers of two, and {name!r} has one scale for all of its "
                f"{layer.group_size} input features: take group_size 32, 64 or 128"
            )
    return OnnxRuntimeOptions(**config.build.options)
