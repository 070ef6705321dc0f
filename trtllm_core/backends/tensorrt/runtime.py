"""A TensorRT engine, loaded: contexts, profiles and addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trtllm_core.backends.tensorrt.contexts import Contexts
from trtllm_core.backends.tensorrt.cuda import Cuda
from trtllm_core.backends.tensorrt.graphs import CapturedRuns
from trtllm_core.backends.tensorrt.kernel_cache import KernelCache
from trtllm_core.backends.tensorrt.profiles import CONTEXT
from trtllm_core.backends.tensorrt.validity import validity_problem
from trtllm_core.errors import BackendError, ConfigError, EngineCorruptError, EngineUnsupportedError
from trtllm_core.plugin.inspection import Bounds

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "bool", "uint8")


class TensorRTRuntime:
    """Runs a serialised engine, one execution context for each of its profiles.

    Nothing here imports TensorRT: the module is passed in, so that a double can take its place.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        plan: the serialised engine.
        cuda: of the device that it runs on.
        cache: where tensorrt_rtx keeps the kernels that it compiled for this GPU; None keeps none.
        cuda_graph: run the generation profile as CUDA graphs: tensorrt_rtx captures by itself, tensorrt is captured.
        weight_streaming_budget: bytes of streamable weights that stay on the GPU, of an engine that was built for
            that; None: as many as TensorRT proposes.

    Raises:
        EngineUnsupportedError: this GPU or this TensorRT cannot run the engine, or there is no GPU.
        EngineCorruptError: the bytes are no whole engine.
    """

    def __init__(
        self,
        trt: Any,
        plan: Any,
        cuda: Cuda,
        *,
        cache: Path | None = None,
        cuda_graph: bool = False,
        weight_streaming_budget: int | None = None,
    ) -> None:
        self._trt, self.cuda = trt, cuda
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._deserialise(plan)
        engine = self.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        kinds = {getattr(trt, name): getattr(torch, name) for name in DTYPES}
        self.dtypes: dict[str, torch.dtype] = {n: kinds[engine.get_tensor_dtype(n)] for n in names}
        self.aliases = {n: a for n in self.outputs if (a := engine.get_aliased_input_tensor(n))}
        """Outputs that are updated inputs, and which: both have one address."""
        self.profiles: list[dict[str, Bounds]] = [
            {n: _bounds(engine.get_tensor_profile_shape(n, i)) for n in self.inputs}
            for i in range(engine.num_optimization_profiles)
        ]
        """Smallest, usual and largest shape of each input, for each profile."""
        _stream_weights(engine, weight_streaming_budget)
        config = engine.create_runtime_config()
        keeps = cache is not None and hasattr(config, "create_runtime_cache")
        self.cache = KernelCache(config, cache) if keeps and cache is not None else None
        by_itself = hasattr(config, "cuda_graph_strategy")
        content = None if self.cache is None else self.cache.content
        self._contexts = Contexts(trt, engine, cuda, content, cuda_graph and by_itself)
        self.graphs = CapturedRuns(cuda) if cuda_graph and not by_itself else None
        """Of the generation profile, where the module does not capture by itself."""

    def _deserialise(self, plan: Any) -> Any:
        trt, runtime = self._trt, self._runtime
        problem = validity_problem(trt, runtime, plan)
        if problem is not None:
            raise EngineUnsupportedError(problem)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineCorruptError(
                f"{trt.__name__} {trt.__version__} cannot read this engine: it was truncated, or written by another "
                "version; build it again"
            )
        return engine

    def profile_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The tightest profile that admits these shapes.

        Raises:
            ConfigError: none does.
        """
        fit = [i for i, profile in enumerate(self.profiles) if all(_admits(profile[n], s) for n, s in shapes.items())]
        if not fit:
            raise ConfigError(
                f"no profile of the engine admits {', '.join(f'{n} {list(s)}' for n, s in shapes.items())}"
            )
        return min(fit, key=lambda i: sum(torch.Size(most).numel() for _, _, most in self.profiles[i].values()))

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        stream: int,
        replay: bool = True,
    ) -> None:
        """Enqueue one execution. Aliased outputs need not be given. ``replay``: from a graph, where there may be one.

        Raises:
            ConfigError: a tensor is missing, unknown, of another dtype, not contiguous, or of a shape that the engine
                does not take or give.
            BackendError: TensorRT could not enqueue it.
        """
        self._check(inputs, outputs)
        profile = self.profile_for({n: tuple(t.shape) for n, t in inputs.items()})
        self._contexts.order(stream)

        def enqueue(given: Mapping[str, torch.Tensor], results: Mapping[str, torch.Tensor], on: int) -> None:
            self._enqueue(self._contexts.get(profile, on), given, results, on)

        if self.graphs is not None and replay and profile != CONTEXT:
            fresh = {name: tensor for name, tensor in outputs.items() if name not in self.aliases}
            self.graphs.run(inputs, fresh, stream, enqueue)
        else:
            enqueue(inputs, outputs, stream)

    def _enqueue(
        self, context: Any, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int
    ) -> None:
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ConfigError(f"the engine refuses shape {list(tensor.shape)} of {name!r}")
            context.set_tensor_address(name, tensor.data_ptr())
        missing = context.infer_shapes()
        if missing:
            raise ConfigError(f"the engine cannot infer its shapes: {', '.join(missing)} are not set")
        for name in self.outputs:
            tensor = inputs[self.aliases[name]] if name in self.aliases else outputs[name]
            shape = tuple(context.get_tensor_shape(name))
            if tuple(tensor.shape) != shape:
                raise ConfigError(f"output {name!r} has shape {list(tensor.shape)}; the engine writes {list(shape)}")
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(stream):
            raise BackendError("TensorRT could not enqueue the execution; its log says why")

    def infer_shapes(self, shapes: Mapping[str, Sequence[int]], stream: int = 0) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs of an execution with these inputs.

        Raises:
            ConfigError: no profile admits them, or an input is missing.
        """
        context = self._contexts.get(self.profile_for(shapes), stream)
        for name, shape in shapes.items():
            context.set_input_shape(name, tuple(shape))
        missing = context.infer_shapes()
        if missing:
            raise ConfigError(f"the engine cannot infer its shapes: {', '.join(missing)} are not set")
        return {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}

    @property
    def library(self) -> str:
        """Module and version."""
        return f"{self._trt.__name__} {self._trt.__version__}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an input or output, -1 where it is not fixed."""
        return tuple(self.engine.get_tensor_shape(name))

    def memory(self) -> dict[str, int]:
        """Bytes of device memory that an execution of each profile takes beside weights and caches."""
        count = self.engine.num_optimization_profiles
        sizes = {f"profile {i}": int(self.engine.get_device_memory_size_for_profile_v2(i)) for i in range(count)}
        return {**sizes, "streamable weights": int(self.engine.streamable_weights_size)}

    def inspect(self) -> str:
        """The engine's layers, as JSON, as the engine inspector tells them."""
        inspector = self.engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Write what was compiled for this GPU beside the engine. It happens by itself when Python ends."""
        if self.cache is not None:
            self.cache.save()

    def _check(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        wanted = {n for n in self.outputs if n not in self.aliases}
        wrong = (inputs.keys() ^ set(self.inputs)) | (wanted - outputs.keys()) | (outputs.keys() - set(self.outputs))
        if wrong:
            raise ConfigError(f"the engine lacks, or does not know, {', '.join(sorted(wrong))}")
        for name, tensor in (*inputs.items(), *outputs.items()):
            if tensor.dtype != self.dtypes[name]:
                raise ConfigError(f"{name!r} is {tensor.dtype}; the engine takes {self.dtypes[name]}")
            if not tensor.is_contiguous():
                raise ConfigError(f"{name!r} is not contiguous")
            source = self.aliases.get(name)
            if source is not None and tensor.data_ptr() != inputs[source].data_ptr():
                raise ConfigError(f"{name!r} must be the tensor of {source!r}: the engine updates it in place")


def _stream_weights(engine: Any, budget: int | None) -> None:
    """Say how many bytes of weights stay on the GPU. It must be said before the first context is made.

    Raises:
        ConfigError: the engine was not built to stream weights, or it has not so many.
    """
    most = int(engine.streamable_weights_size)
    if budget is not None and not most:
        raise ConfigError("weight_streaming_budget is for engines that were built with weight_streaming")
    if budget is not None and not 0 <= budget <= most:
        raise ConfigError(f"weight_streaming_budget is {budget}; this engine has {most} bytes of streamable weights")
    if most:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget() if budget is None else budget


def _bounds(shapes: Sequence[Sequence[int]]) -> Bounds:
    least, usual, most = (tuple(shape) for shape in shapes)
    return least, usual, most


def _admits(bounds: Sequence[Sequence[int]], shape: Sequence[int]) -> bool:
    least, _, most = bounds
    return len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
