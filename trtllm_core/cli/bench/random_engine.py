"""An engine of a published shape with random weights, made in the memory of the device that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_core.cli.bench.shapes import find_shape
from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from trtllm_core.config import BuildConfig
    from trtllm_core.runner import ModelRunner

_SPREAD = 0.02
"""Standard deviation of the matrices: small, as models are initialised, so that half precision does not overflow."""


def random_runner(shape: str, build: BuildConfig, device: str, seed: int = 0) -> ModelRunner:
    """A runner over random weights. Nothing touches the disk, and on CUDA nothing but one step's inputs the host.

    Matrices are drawn, norms are 1 and biases 0. The same seed gives the same weights on the same kind of device.

    Raises:
        ConfigError: there is no such shape; its model cannot serve the limits; or another backend, or several ranks,
            are asked for.
        PluginNotFoundError: the model's family is not installed; the message names the pip command.
        EngineUnsupportedError: the device is not there.
    """
    import torch

    from trtllm_core.backends.modules import meta_module, parameter_shapes
    from trtllm_core.backends.torch.backend import TorchBackend, check_device
    from trtllm_core.engine.build import plan_engine
    from trtllm_core.parallel import TensorParallel
    from trtllm_core.plugin import Plugins
    from trtllm_core.runner import ModelRunner

    plugins = Plugins.load()
    config, family, backend = plan_engine(find_shape(shape), build, plugins)
    if not isinstance(backend, TorchBackend) or build.tp_size > 1:
        raise ConfigError("random weights run on the torch backend, on one rank; build an engine for anything else")
    place = check_device(torch.device(device), config, False)
    if config.quantization is not None:
        raise ConfigError("random weights are not quantised: leave quantization out, or build an engine")
    random = torch.Generator(place).manual_seed(seed)
    rank = TensorParallel()
    dtype = getattr(torch, config.model.dtype)
    shapes = parameter_shapes(meta_module(config, family, rank))
    tensors = {name: _weight(name, size, dtype, random) for name, size in shapes.items()}
    return ModelRunner.from_engine(backend.assemble(tensors, config, family, place, rank), plugins=plugins)


def _weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    import torch

    options: dict[str, Any] = {"dtype": dtype, "device": random.device}
    if len(shape) > 1:
        return torch.empty(shape, **options).normal_(0, _SPREAD, generator=random)
    return torch.ones(shape, **options) if name.endswith("weight") else torch.zeros(shape, **options)
