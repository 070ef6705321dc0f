"""The torch backend: weights as safetensors, mapped into the family's module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trtllm_core.backends.modules import fill, meta_module, parameter_dtypes, parameter_shapes
from trtllm_core.backends.torch.cache_folder import cache_folder
from trtllm_core.backends.torch.cpu.kernels import DTYPES, Kernels
from trtllm_core.backends.torch.cpu.layers import accelerate
from trtllm_core.backends.torch.cuda.support import ADA, unsupported
from trtllm_core.backends.torch.executable import TorchExecutable, tensor_specs
from trtllm_core.backends.torch.kernels import choose_kernels, plain_product
from trtllm_core.backends.torch.layer_cache import CODES
from trtllm_core.backends.torch.lora import LoraBank
from trtllm_core.backends.torch.quantized import use_products
from trtllm_core.config import EngineConfig
from trtllm_core.engine.directory import parse_config
from trtllm_core.engine.lora import lora_sizes
from trtllm_core.engine.weights import Weights, is_safetensors, read_metadata, stored_tensors, write_weights
from trtllm_core.errors import ConfigError, EngineError, EngineUnsupportedError, listing
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Availability, Backend, BuiltRank, Finding, Inspection, ModelFamily
from trtllm_core.plugin.backend import Progress
from trtllm_core.plugin.inspection import group_layers

_log = logging.getLogger(__name__)


class TorchBackend(Backend):
    """PyTorch on the CPU or CUDA."""

    name = "torch"
    contract = "packed_paged"
    gives = frozenset({"multi_position", "hidden_states"})
    takes = frozenset({"lora", "prompt_tables", "quantization", "zero_points", "offsets", "float8", "tables"})

    def probe(self) -> Availability:
        """See ``Backend``."""
        try:
            found = version("torch")
        except PackageNotFoundError:
            return Availability(False, "PyTorch is not installed; pip install torch")
        return Availability(True, "CPU, and CUDA where there is a GPU", found)

    def build(
        self,
        config: EngineConfig,
        family: ModelFamily,
        weights: Iterable[tuple[str, torch.Tensor]],
        directory: Path,
        rank: int,
        progress: Progress,
    ) -> BuiltRank:
        """See ``Backend``: one safetensors file, with the engine's config and the rank in its metadata.

        Raises:
            ConfigError: the build asks for what this backend does not do.
            CheckpointError: the weights do not make up the family's module.
        """
        if config.build.options:
            raise ConfigError(f"the torch backend has no build option {listing(config.build.options)}")
        if config.kv_dtype not in (config.model.dtype, *CODES):
            raise ConfigError(
                f"the torch backend keeps keys and values as {', '.join(CODES)} codes, or in the engine's dtype, "
                f"{config.model.dtype}: leave kv_dtype={config.kv_dtype!r} out"
            )
        if config.kv_dtype in CODES and config.model.head_size % 2:
            raise ConfigError(f"{config.kv_dtype} keys and values need heads of an even size: leave kv_dtype out")
        module = meta_module(config, family, TensorParallel(rank, config.build.tp_size))
        path = directory / f"rank{rank}.safetensors"
        metadata = {"engine": config.model_dump_json(), "rank": str(rank)}
        write_weights(path, parameter_shapes(module), parameter_dtypes(module), weights, metadata)
        return BuiltRank(path)

    def load(
        self,
        source: Path | bytes | memoryview,
        config: EngineConfig,
        family: ModelFamily,
        *,
        device: torch.device | str = "cpu",
        parallel: TensorParallel | None = None,
        batch_invariant: bool = False,
        native: bool | None = None,
        cuda_graphs: bool | None = None,
        int8_activations: bool | None = None,
        **unknown: Any,
    ) -> TorchExecutable:
        """See ``Backend``. Weights on the CPU stay a view of the mapped file, or are packed for it.

        ``native``: whether a CPU uses kernels compiled for it beside PyTorch's; None: where they can be.
        ``cuda_graphs``: whether decode steps are captured; None: where they can be.
        ``int8_activations``: whether compiled kernels round what meets quantised weights to 8 bits, in groups of 32,
        for the few rows of a decode step; None: where the CPU has instructions for that.

        Raises:
            ConfigError: an unknown option, or ``parallel`` is not the rank that the file was built for.
            EngineUnsupportedError: the device is not there, or cannot do what is asked.
            EngineCorruptError: the file is not what the config says.
        """
        if unknown:
            raise ConfigError(f"the torch backend has no option {listing(unknown)}")
        device = check_device(torch.device(device), config, batch_invariant)
        parallel = _check_rank(source, config, parallel)
        weights = Weights(source, device)
        return self.assemble(
            weights.tensors,
            config,
            family,
            device,
            parallel,
            batch_invariant,
            native,
            weights.evict,
            cuda_graphs,
            int8_activations,
        )

    def assemble(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: EngineConfig,
        family: ModelFamily,
        device: torch.device,
        parallel: TensorParallel,
        batch_invariant: bool = False,
        native: bool | None = None,
        evict: Callable[[torch.Tensor], None] = lambda weight: None,
        cuda_graphs: bool | None = None,
        int8_activations: bool | None = None,
    ) -> TorchExecutable:
        """An executable over weights that are on ``device`` already: one tensor for each parameter of the module.

        Args:
            tensors: kept as they are, or packed for the CPU.
            native: see ``load``.
            evict: told of weights that were packed; see ``Weights.evict``.
            cuda_graphs, int8_activations: see ``load``.

        Raises:
            EngineCorruptError: the tensors are not what the config says.
        """
        graphs = _check_graphs(cuda_graphs, device, parallel)
        module = meta_module(config, family, parallel)
        fill(module, config, tensors, device)
        dtype = getattr(torch, config.model.dtype)
        plain = parallel.size == 1 and not config.lora_layers
        switch = choose_kernels(module, device, dtype, batch_invariant, evict, plain and graphs)
        product = plain_product(device, dtype, batch_invariant)
        kernels = _native_kernels(native, device, dtype, batch_invariant)
        rounds = _check_rounding(int8_activations, kernels, config)
        if kernels is not None:
            accelerate(module, kernels, product, rounds, evict)
        use_products(module, product)
        lora = None
        if config.lora_layers:
            sizes = lora_sizes(family, config, parallel)
            lora = LoraBank(module, sizes, config.build, dtype, device, product, batch_invariant)
        return TorchExecutable(
            config, module, device, batch_invariant, parallel, lora, kernels, cuda_graphs=graphs, switch=switch
        )

    def config_of(self, source: Path | bytes | memoryview) -> EngineConfig | None:
        """See ``Backend``."""
        engine = read_metadata(source).get("engine") if is_safetensors(source) else None
        return None if engine is None else parse_config(engine, "the config in the engine's metadata")

    def inspect(self, path: Path, config: EngineConfig, family: ModelFamily) -> Inspection:
        """See ``Backend``: the layers are the leaves of the family's module."""
        parallel = TensorParallel(int(read_metadata(path).get("rank", 0)), config.build.tp_size)
        leaves = [
            (name, type(layer).__name__)
            for name, layer in meta_module(config, family, parallel).named_modules()
            if next(layer.children(), None) is None
        ]
        return Inspection(
            "the family's module, and the header of the weights' file",
            tensor_specs(config),
            group_layers(leaves),
            weights=stored_tensors(path),
        )

    def diagnose(self, path: Path, config: EngineConfig) -> list[Finding]:
        """See ``Backend``."""
        try:
            carried = self.config_of(path)
        except EngineError as error:
            return [Finding("problem", path.name, str(error))]
        if carried is None:
            return [Finding("problem", path.name, "it carries no engine config: it is no engine of this backend")]
        if carried.model != config.model:
            return [Finding("problem", path.name, "it is of another model than config.json: build the engine again")]
        return [Finding("ok", path.name, f"{config.model.dtype} weights, read on the CPU or on CUDA")]


def check_device(device: torch.device, config: EngineConfig, batch_invariant: bool) -> torch.device:
    """The device, if it is there and can do what is asked.

    Raises:
        EngineUnsupportedError: it is not, or cannot.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineUnsupportedError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU; use device='cpu'")
    if config.kv_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < ADA:
        raise EngineUnsupportedError(
            "fp8 keys and values need a GPU of compute capability 8.9 or newer: build the engine with kv_dtype='int8'"
        )
    if batch_invariant and (device.type != "cpu" or config.model.dtype != "float32"):
        raise EngineUnsupportedError(
            f"batch_invariant runs float32 engines on the CPU; this engine is {config.model.dtype} on {device.type}"
        )
    return device


def _native_kernels(asked: bool | None, device: torch.device, dtype: torch.dtype, invariant: bool) -> Kernels | None:
    """The compiled kernels, where they are wanted and can be had."""
    if asked is False or (asked is None and (invariant or device.type != "cpu" or dtype not in DTYPES)):
        return None
    try:
        if invariant or device.type != "cpu" or dtype not in DTYPES:
            raise EngineUnsupportedError("they run float32 and bfloat16 engines on the CPU, not batch_invariant")
        return Kernels(dtype, cache_folder())
    except EngineUnsupportedError as error:
        if asked:
            raise EngineUnsupportedError(f"native kernels were asked for, but cannot be had: {error}") from error
        _log.info("PyTorch's kernels alone are used: %s", error)
        return None


def _check_rounding(asked: bool | None, kernels: Kernels | None, config: EngineConfig) -> bool:
    """Whether compiled products round activations."""
    why: str | None = None
    if config.quantization is None:
        why = "the engine's weights are not quantised"
    elif kernels is None:
        why = "only the kernels that are compiled for a CPU do that, and they are not used here"
    elif not kernels.multiplies_bytes:
        why = "the CPU has no instructions for it (AVX512-VNNI or AVX-VNNI)"
    if asked and why:
        raise EngineUnsupportedError(f"int8_activations was asked for, but {why}")
    return why is None and asked is not False


def _check_graphs(asked: bool | None, device: torch.device, parallel: TensorParallel) -> bool:
    """Whether decode steps are captured as CUDA graphs."""
    why = unsupported(device) or ("an engine of several ranks runs without" if parallel.size > 1 else None)
    if asked and why:
        raise EngineUnsupportedError(f"cuda_graphs was asked for, but there are none here: {why}")
    return why is None and asked is not False


def _check_rank(
    source: Path | bytes | memoryview, config: EngineConfig, parallel: TensorParallel | None
) -> TensorParallel:
    """Whose weights these are. The ranks' files are of one shape, so that nothing else would tell them apart."""
    size, rank = config.build.tp_size, int(read_metadata(source).get("rank", 0))
    if parallel is None:
        return TensorParallel(rank, size)
    if (parallel.rank, parallel.size) != (rank, size):
        raise ConfigError(
            f"this is the engine of rank {rank} of {size}, but parallel says rank {parallel.rank} of {parallel.size}"
        )
    return parallel
