"""From an ONNX graph to a serialised TensorRT engine."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.backends.tensorrt.profiles import input_bounds, profile_sizes
from trtllm_core.backends.tensorrt.verify import check_network
from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.errors import ConfigError, EngineUnsupportedError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]


def build_plan(
    trt: Any,
    graph: Path,
    config: EngineConfig,
    options: TensorRTOptions,
    kind: Any,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> tuple[Any, dict[str, int]]:
    """The serialised engine, a buffer. The network is checked before it is built: see ``verify``.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        graph: the ONNX file, its weights beside it.
        config: of the engine.
        options: of the build.
        kind: of attention that the graph has.
        progress: called with the name of the builder's phase, steps done and steps in all.

    Raises:
        EngineUnsupportedError: TensorRT cannot parse the graph or build an engine of it, or the network is wrong.

    Returns:
        The plan, and how many layers of each kind its network has.
    """
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise EngineUnsupportedError(f"TensorRT's parser refuses the graph: {errors}")
    check_network(trt, network, config.model.num_layers, kind, config.model.dtype)
    settings = builder.create_builder_config()
    if options.weight_streaming:
        settings.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if config.model.dtype == "float32":
        settings.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32, or no two engines agree
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    settings.progress_monitor = _make_monitor(trt, progress)
    _set_targets(trt, settings, options.compute_capabilities)
    for tokens, asked in profile_sizes(config.build, options):
        settings.add_optimization_profile(_profile(builder, network, config.build, tokens, asked))
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise EngineUnsupportedError(f"TensorRT cannot build an engine of the graph: {logger.last or 'see its log'}")
    return plan, dict(Counter(network.get_layer(i).type.name for i in range(network.num_layers)))


def _profile(builder: Any, network: Any, build: BuildConfig, tokens: int, asked: int) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if -1 in shape:
            profile.set_shape(tensor.name, *input_bounds(tensor.name, shape, build, tokens, asked))
    return profile


def _set_targets(trt: Any, settings: Any, targets: tuple[str, ...]) -> None:
    if not targets:
        return
    if not hasattr(settings, "set_compute_capability"):
        raise ConfigError("compute_capabilities is an option of tensorrt_rtx; tensorrt builds for its own GPU")
    settings.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        name = f"SM{target.replace('.', '')}"
        if not hasattr(trt.ComputeCapability, name):
            known = ", ".join(f"{n[2:-1]}.{n[-1]}" for n in dir(trt.ComputeCapability) if n.startswith("SM"))
            raise ConfigError(f"this TensorRT builds for no compute capability {target!r}; it knows {known}")
        settings.set_compute_capability(getattr(trt.ComputeCapability, name), i)


def _make_logger(trt: Any) -> Any:
    """TensorRT's log in ours, and its last error for the sentence that refuses."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        last = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.last = message
            level = {"INTERNAL_ERROR": 40, "ERROR": 40, "WARNING": 30, "INFO": 20}.get(severity.name, 10)
            log.log(level, "%s", message)

    return Logger()


def _make_monitor(trt: Any, progress: Callable[[str, int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.totals.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            total = self.totals.pop(phase_name, 0)
            progress(phase_name, total, total)

    return Monitor()
