"""An engine of a published shape with random weights, made in the memory of the device that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_core.cli.bench.shapes import find_shape
from trtllm_core.errors import ConfigError, listing

if TYPE_CHECKING:
    import torch

    from trtllm_core.config import BuildConfig, KVCacheConfig
    from trtllm_core.runner import ModelRunner

_OPTIONS = frozenset({"batch_invariant", "native", "cuda_graphs", "int8_activations"})
"""Of the backend, those that say how it runs what is in memory already."""
_SPREAD = 0.02
"""Standard deviation of the matrices: small, as models are initialised, so that half precision does not overflow."""
_STEP = 0.004
"""What a code of a quantised weight is worth: about as much spread, of 4 bits."""


def random_runner(
    shape: str, build: BuildConfig, device: str, seed: int = 0, kv_cache: KVCacheConfig | None = None, **options: Any
) -> ModelRunner:
    """A runner over random weights. Nothing touches the disk, and on CUDA nothing but one step's inputs the host.

    Matrices are drawn, norms are 1 and biases 0. The same seed gives the same weights on the same kind of device.
    ``options`` are the backend's, as ``ModelRunner.from_dir`` takes them.

    Raises:
        ConfigError: there is no such shape; its model cannot serve the limits; or another backend, or several ranks,
            are asked for; or an option that the backend does not have.
        PluginNotFoundError: the model's family is not installed; the message names the pip command.
        EngineUnsupportedError: the device is not there.
    """
    import torch

    from trtllm_core.backends.modules import meta_module
    from trtllm_core.backends.torch.backend import TorchBackend, check_device
    from trtllm_core.engine.build import plan_engine
    from trtllm_core.parallel import TensorParallel
    from trtllm_core.plugin import Plugins
    from trtllm_core.runner import ModelRunner

    plugins = Plugins.load()
    config, family, backend = plan_engine(find_shape(shape), build, plugins)
    if not isinstance(backend, TorchBackend) or build.tp_size > 1:
        raise ConfigError("random weights run on the torch backend, on one rank; build an engine for anything else")
    if unknown := options.keys() - _OPTIONS:
        raise ConfigError(f"the torch backend has no option {listing(unknown)} over random weights")
    place = check_device(torch.device(device), config, options.get("batch_invariant", False))
    random = torch.Generator(place).manual_seed(seed)
    rank = TensorParallel()
    module = meta_module(config, family, rank)
    layers = {} if config.quantization is None else config.quantization.layers
    numbers = {f"{name}.weight" for name, layer in layers.items() if layer.form == "float8"}
    tensors = {name: _weight(name, one, random, name in numbers) for name, one in module.named_parameters()}
    engine = backend.assemble(tensors, config, family, place, rank, **options)
    return ModelRunner.from_engine(engine, plugins=plugins, kv_cache=kv_cache)


def _weight(name: str, parameter: torch.Tensor, random: torch.Generator, float8: bool) -> torch.Tensor:
    """What takes the place of a parameter without memory. Codes of quantised weights are all alike in likelihood, but
    those that are numbers of 8 bits (``float8``), which are drawn like matrices."""
    import torch

    weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=random.device)
    if float8:
        drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device=random.device)
        return drawn.normal_(0, _SPREAD / _STEP, generator=random).to(torch.float8_e4m3fn).view(torch.uint8)
    if parameter.dtype == torch.uint8:
        return weight.random_(0, 256, generator=random)
    part = name.rsplit(".", 1)[-1]
    if part in ("scales", "offsets"):
        return weight.fill_(_STEP if part == "scales" else 0.0)
    if weight.ndim > 1:
        return weight.normal_(0, _SPREAD, generator=random)
    return weight.fill_(1.0 if part == "weight" else 0.0)
