"""What a build's quantisation makes of a model, before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trtllm_core.checkpoint import Checkpoint
from trtllm_core.config import BuildConfig, ModelConfig, Quantization, QuantizedLayer
from trtllm_core.errors import ConfigError
from trtllm_core.nn import VocabParallelEmbedding
from trtllm_core.nn.quantized import is_head, quantizable
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Backend, ModelFamily
from trtllm_core.quantize import plan_quantization


def quantization_of(
    family: ModelFamily, model: ModelConfig, build: BuildConfig, checkpoint: Checkpoint, backend: Backend
) -> Quantization | None:
    """How each layer is stored; None where the build does not ask.

    Raises:
        ConfigError: the backend, the model's sizes, the checkpoint or other choices of the build rule it out.
    """
    wish = build.quantization
    if wish is None:
        return None
    if "quantization" not in backend.takes:
        raise ConfigError(f"backend {backend.name!r} takes no quantised weights: leave quantization out")
    if wish.weights == "fp8" and "float8" not in backend.takes:
        raise ConfigError(f"backend {backend.name!r} takes no fp8 weights: build with quantization int4 or int8")
    if build.max_lora_rank:
        raise ConfigError("adapters need weights in the engine's dtype: leave max_lora_rank or quantization out")
    if wish.symmetric is None and wish.weights == "int4":
        wish = wish.replace(symmetric="zero_points" not in backend.takes)
    with torch.device("meta"):
        module = family.module(model, TensorParallel(0, build.tp_size))
    layers = dict(quantizable(module))
    if not {"tables", "byte_tables"} & backend.takes:
        layers = {name: layer for name, layer in layers.items() if not isinstance(layer, VocabParallelEmbedding)}
    sizes = {name: (layer.weight.shape[0], layer.weight.shape[1]) for name, layer in layers.items()}
    heads = frozenset(name for name, layer in layers.items() if is_head(layer))
    weights = family.weights(model, checkpoint)
    sources = {weight.target.removesuffix(".weight"): [one.source for one in weight.pieces] for weight in weights}
    made = plan_quantization(wish, sizes, heads, sources, checkpoint.stored)
    for name, how in made.layers.items():
        if how.form != "symmetric" and how.form not in backend.takes:
            raise ConfigError(
                f"backend {backend.name!r} takes symmetric codes alone, and {name!r} has {how.form.replace('_', ' ')}: "
                "build with quantization int4, symmetric, or int8"
            )
    if "tables" not in backend.takes:
        made = byte_tables_alone(made, [n for n, layer in layers.items() if isinstance(layer, VocabParallelEmbedding)])
    return made


def byte_tables_alone(made: Quantization, tables: Sequence[str]) -> Quantization:
    """Without the tables whose codes are not of 8 bits and symmetric: kept ones are in the engine's dtype instead.

    Raises:
        ConfigError: other codes were asked for.
    """
    others = [name for name in tables if name in made.layers and not _is_of_bytes(made.layers[name])]
    if others and made.weights != "keep":
        raise ConfigError(
            f"a table that is both embedding and head has codes of 8 bits here, and {others[0]!r} would have "
            f"{made.layers[others[0]].bits}: leave the head at 8 or 16 bits"
        )
    return made.replace(layers={name: layer for name, layer in made.layers.items() if name not in others})


def _is_of_bytes(layer: QuantizedLayer) -> bool:
    return layer.bits == 8 and layer.form == "symmetric"
