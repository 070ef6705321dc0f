"""The TensorRT backend: engines built anywhere, checked before they are built, run where their GPU is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtllm_core.backends.linear.limits import check_limits
from trtllm_core.backends.tensorrt.cuda import cuda_of
from trtllm_core.backends.tensorrt.diagnosing import capability_problem, diagnose
from trtllm_core.backends.tensorrt.executable import TensorRTExecutable
from trtllm_core.backends.tensorrt.library import INSTALL, installed, load_library
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.runtime import TensorRTRuntime
from trtllm_core.config import EngineConfig
from trtllm_core.engine.weights import Weights, map_file
from trtllm_core.errors import ConfigError, EngineUnsupportedError, EngineVersionError, TrtllmCoreError, listing
from trtllm_core.nn import Attention
from trtllm_core.plugin import Availability, Backend, BuiltRank, Finding, Inspection, ModelFamily
from trtllm_core.plugin.backend import Progress

if TYPE_CHECKING:
    from trtllm_core.backends.linear.export import GraphOptions

HEAD_SIZES = (8, 512)
"""Smallest and largest head that attention is built for; it is a multiple of 8."""


class TensorRTBackend(Backend):
    """TensorRT for data-center GPUs, or TensorRT-RTX, whichever is installed or asked for."""

    name = "tensorrt"
    contract = "padded_linear"
    gives = frozenset({"multi_position"})
    takes = frozenset({"quantization", "offsets", "byte_tables"})

    def probe(self) -> Availability:
        """See ``Backend``."""
        found = installed()
        if not found:
            return Availability(False, f"no TensorRT is installed; {INSTALL['tensorrt_rtx']}")
        return Availability(True, f"builds with {' and '.join(found)}; runs where there is a GPU for it")

    def build(
        self,
        config: EngineConfig,
        family: ModelFamily,
        weights: Iterable[tuple[str, torch.Tensor]],
        directory: Path,
        rank: int,
        progress: Progress,
    ) -> BuiltRank:
        """See ``Backend``: ``rank{rank}.engine``. Needs no GPU.

        Raises:
            ConfigError: an option that is not there, or limits that engines cannot have.
            EngineUnsupportedError: TensorRT is not installed, or cannot build this model; or it would build it wrong.
            CheckpointError: the weights do not make up the family's module.
        """
        from trtllm_core.backends.linear.export import GraphOptions, signed_file
        from trtllm_core.backends.linear.writing import write_weights_and_graph
        from trtllm_core.backends.tensorrt.build import build_plan

        options = TensorRTOptions(**config.build.options)
        check_limits(config, ("onnx", "onnxscript"), INSTALL["tensorrt_rtx"])
        trt = load_library(options.module)
        as_inputs = options.weights == "inputs"
        if as_inputs and config.quantization is not None:
            raise ConfigError(
                "quantised weights are part of a TensorRT engine: leave the option weights or quantization"
            )
        form = GraphOptions(
            "tensorrt", options.attention, weights_as_inputs=as_inputs, debug_tensors=options.debug_tensors
        )
        file = directory / f"rank{rank}.safetensors"
        graph, kind = write_weights_and_graph(config, family, weights, file, form, _check_attention)
        record: dict[str, Any] = {"module": trt.__name__, "version": trt.__version__, "attention": kind}
        plan, record["layers"] = build_plan(trt, graph, config, options, kind, progress)
        if options.verify:
            record["verified"] = _verified(graph, file, config, family, replace(form, attention=kind))
        path = file.with_suffix(".engine")
        with path.open("wb") as out:
            out.write(plan)
        graph.unlink()
        signed_file(file).unlink(missing_ok=True)
        if not as_inputs:
            file.unlink()
        return BuiltRank(path, (file,) if as_inputs else (), record)

    def load(
        self,
        source: Path | bytes | memoryview,
        config: EngineConfig,
        family: ModelFamily,
        *,
        device: torch.device | str = "cuda",
        cuda_graph: bool = False,
        weight_streaming_budget: int | None = None,
        **unknown: Any,
    ) -> TensorRTExecutable:
        """See ``Backend``. What tensorrt_rtx compiles for the GPU is kept in ``rank{rank}.cache`` beside the engine.

        Args:
            source: see ``Backend``.
            config: see ``Backend``.
            family: see ``Backend``.
            device: a GPU.
            cuda_graph: run the generation profile as CUDA graphs.
            weight_streaming_budget: bytes of streamable weights that stay on the GPU; None: as many as TensorRT
                proposes.
            unknown: refused.

        Raises:
            ConfigError: an unknown option.
            EngineVersionError: another TensorRT built the engine than the one that is installed.
            EngineUnsupportedError: there is no GPU, or it cannot run the engine.
            EngineCorruptError: the engine is damaged.
        """
        if unknown:
            raise ConfigError(f"the tensorrt backend has no option {listing(unknown)}")
        device = torch.device(device)
        if device.type != "cuda":
            raise ConfigError(f"TensorRT engines run on CUDA GPUs, not on {device.type!r}: use the onnxruntime backend")
        trt = load_library(config.record.get("module"))
        check_version(config, trt.__version__)
        if not torch.cuda.is_available():
            raise EngineUnsupportedError("a TensorRT engine needs a CUDA GPU to run, and PyTorch finds none here")
        problem = capability_problem(trt.__name__, torch.cuda.get_device_capability(device))
        if problem is not None:
            raise EngineUnsupportedError(f"this engine cannot run here: {problem}")
        cache = source.with_suffix(".cache") if isinstance(source, Path) else None
        plan = map_file(source) if isinstance(source, Path) else source
        runtime = TensorRTRuntime(
            trt,
            plan,
            cuda_of(device),
            cache=cache,
            cuda_graph=cuda_graph,
            weight_streaming_budget=weight_streaming_budget,
        )
        return TensorRTExecutable(config, runtime, device, load_weights(source, config, runtime, device))

    def inspect(self, path: Path, config: EngineConfig, family: ModelFamily) -> Inspection:
        """See ``Backend``: by the plan where it can be read, which takes a GPU, else by the record of its build."""
        from trtllm_core.backends.tensorrt.inspecting import inspect_plan, inspect_record

        try:
            return inspect_plan(open_plan(path, config), path, config)
        except TrtllmCoreError as error:
            return inspect_record(path, config, str(error))

    def diagnose(self, path: Path, config: EngineConfig) -> list[Finding]:
        """See ``Backend``: versions, the GPU, and what TensorRT says of the plan."""
        return list(diagnose(path, config))


def open_plan(path: Path, config: EngineConfig) -> TensorRTRuntime:
    """The plan, deserialised and not run.

    Raises:
        EngineError: it cannot be read here.
        BackendError: TensorRT cannot be loaded.
    """
    trt = load_library(config.record.get("module"))
    check_version(config, trt.__version__)
    if not torch.cuda.is_available():
        raise EngineUnsupportedError("TensorRT reads plans on a machine with a CUDA GPU, and PyTorch finds none here")
    return TensorRTRuntime(trt, map_file(path), cuda_of(torch.device("cuda", torch.cuda.current_device())))


def load_weights(
    source: Path | bytes | memoryview, config: EngineConfig, runtime: TensorRTRuntime, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inputs of an engine that are weights, from the file beside it; none for one that has them in itself.

    Raises:
        EngineUnsupportedError: the engine was given as bytes, so that there is no file beside it.
    """
    companions = config.ranks[0].companions if config.ranks else ()
    if not companions:
        return {}
    if not isinstance(source, Path):
        raise EngineUnsupportedError("this engine takes its weights as inputs: load it by its path, they lie beside it")
    tensors = Weights(source.with_name(companions[0].name), device).tensors
    return {name: tensor for name, tensor in tensors.items() if name in runtime.inputs}


def check_version(config: EngineConfig, running: str) -> None:
    """An engine runs in the version of TensorRT that built it.

    Raises:
        EngineVersionError: it is another one.
    """
    built, module = config.record.get("version"), config.record.get("module", "tensorrt")
    if built != running:
        raise EngineVersionError(
            f"the engine was built by {module} {built}, and {running} is installed: engines run in the version that "
            f"built them; pip install {module}=={built}, or build it again"
        )


def _verified(
    graph: Path, weights: Path, config: EngineConfig, family: ModelFamily, form: GraphOptions
) -> dict[str, Any]:
    """What the graph's bytes compute, against the torch backend.

    ONNX Runtime has no bfloat16 on the CPU: there the graph's float32 twin, of the same weights, stands for it.
    """
    from trtllm_core.backends.linear.judge import graph_errors
    from trtllm_core.backends.linear.writing import write_weights_and_graph

    if config.model.dtype != "bfloat16":
        return graph_errors(graph, weights, config, family)
    with tempfile.TemporaryDirectory(dir=graph.parent) as place:
        twin = config.replace(model=config.model.replace(dtype="float32"))
        file, tensors = Path(place) / weights.name, Weights(weights, torch.device("cpu")).tensors
        path, _ = write_weights_and_graph(twin, family, tensors.items(), file, form)
        return {**graph_errors(path, file, twin, family), "twin_of": "bfloat16"}


def _check_attention(module: torch.nn.Module) -> None:
    least, most = HEAD_SIZES
    for layer in module.modules():
        if not isinstance(layer, Attention):
            continue
        if layer.head_size % 8 or not least <= layer.head_size <= most:
            raise EngineUnsupportedError(
                f"TensorRT builds attention for head sizes that are multiples of 8 from {least} to {most}, and this "
                f"model's are {layer.head_size}"
            )
        if layer.softcap is not None:
            raise EngineUnsupportedError("TensorRT's attention has no soft cap on scores, which this model needs")
