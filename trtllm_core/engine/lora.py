"""LoRA adapters and an engine: which of its layers they may change, and where their factors go.

A family's weight map says how tensors of a checkpoint become parameters. An adapter's factors take the same road, so
that a family needs no code of its own: the outputs of a pair (rows of ``b``) go through the tensor's transformation and
shard, its inputs (columns of ``a``) are split where the tensor's are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch

from trtllm_core.checkpoint.peft import LoraPair, PeftAdapter
from trtllm_core.config import BuildConfig, EngineConfig, LoraLayer, ModelConfig
from trtllm_core.engine.shards import shard
from trtllm_core.errors import CheckpointError, ConfigError, PluginContractError, listing
from trtllm_core.nn import Linear, LMHead
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, LowRank, ModelFamily, Piece
from trtllm_core.plugin.family import Transform

CLASSIC = {
    "attn_q": ("q_proj",),
    "attn_k": ("k_proj",),
    "attn_v": ("v_proj",),
    "attn_qkv": ("c_attn", "query_key_value", "qkv_proj"),
    "attn_dense": ("o_proj", "out_proj", "attn.c_proj", "self_attention.dense", "attention.dense"),
    "mlp_h_to_4h": ("gate_proj", "fc_in", "c_fc", "dense_h_to_4h", "gate_up_proj"),
    "mlp_gate": ("up_proj",),
    "mlp_4h_to_h": ("down_proj", "fc_out", "mlp.c_proj", "dense_4h_to_h"),
}
"""The classic runtime's names of modules, and what checkpoints call them."""


@dataclass(frozen=True)
class NamesOnly:
    """A Hugging Face checkpoint of which no more than the architecture and some names are known."""

    architecture: str
    known: frozenset[str] = frozenset()

    @property
    def format(self) -> Literal["hf", "gguf"]:
        """See ``CheckpointView``, as all that follows."""
        return "hf"

    @property
    def config(self) -> Mapping[str, Any]:
        return {}

    def names(self) -> frozenset[str]:
        return self.known

    def shape(self, name: str) -> tuple[int, ...]:
        raise CheckpointError(f"the shape of {name!r} is not known: an adapter says nothing about the model's weights")

    def tensor(self, name: str) -> torch.Tensor:
        raise CheckpointError(f"{name!r} is not there: an adapter does not hold the model's weights")


@dataclass(frozen=True)
class LoraPart:
    """The output features of a layer that one tensor of the checkpoint makes, in one or several pieces."""

    layer: str
    """Name in the family's module."""
    module: str
    """Name in the checkpoint's model."""
    pieces: tuple[Piece, ...]
    rows: tuple[int, ...]
    """Output features of each piece in the whole model."""
    inputs: int
    """Input features in the whole model."""

    def share(self, b: torch.Tensor, config: ModelConfig, parallel: TensorParallel) -> torch.Tensor:
        """A rank's rows of ``b [out, r]``, in the layer's order."""
        return torch.cat([_outputs(_transformed(piece, b), piece, config, parallel) for piece in self.pieces])

    def size(self, config: ModelConfig, parallel: TensorParallel) -> int:
        """How many of its output features a rank has."""
        pieces = zip(self.pieces, self.rows, strict=True)
        return sum(
            _outputs(torch.empty(rows, 0, device="meta"), piece, config, parallel).shape[0] for piece, rows in pieces
        )


def lora_layers(
    family: ModelFamily, model: ModelConfig, build: BuildConfig, checkpoint: CheckpointView
) -> dict[str, LoraLayer]:
    """The linear layers of an engine that is to be built for adapters, and how their output features are made up.

    Raises:
        ConfigError: ``lora_target_modules`` names no layer of the model.
    """
    with torch.device("meta"):
        module = family.module(model, TensorParallel())
    linear = {
        name: layer.weight.shape[1]
        for name, layer in module.named_modules()
        if isinstance(layer, Linear) and not isinstance(layer, LMHead)
    }
    layers = {
        _layer(weight.target): LoraLayer(
            inputs=linear[_layer(weight.target)],
            rows=tuple(_rows(piece, checkpoint.shape(piece.source)) for piece in weight.pieces),
        )
        for weight in family.weights(model, checkpoint)
        if weight.target.endswith(".weight") and _layer(weight.target) in linear
    }
    modules = {part.module for part in lora_parts(family, model, layers)}
    unknown = [name for name in build.lora_target_modules if not any(_targeted(one, (name,)) for one in modules)]
    if unknown:
        raise ConfigError(
            f"lora_target_modules: the model has no linear layer called {listing(unknown)}; it has {_ends(modules)}"
        )
    return layers


def place_adapter(
    adapter: PeftAdapter, family: ModelFamily, config: EngineConfig, parallel: TensorParallel
) -> dict[str, tuple[LowRank, ...]]:
    """One rank's factors of an adapter, ``b`` scaled and in float32, by layer of the family's module.

    Raises:
        ConfigError: the engine was not built for adapters, for such a rank, or for these layers.
        CheckpointError: the adapter changes layers that the engine lacks or has in another size.
        PluginContractError: the family's weight map has no place for the factors.
    """
    build = config.build
    if not build.max_lora_rank:
        raise ConfigError("the engine was not built for LoRA adapters: build it with max_lora_rank")
    if adapter.rank > build.max_lora_rank:
        raise ConfigError(
            f"{adapter.path} has rank {adapter.rank}; the engine was built for max_lora_rank {build.max_lora_rank}"
        )
    parts = lora_parts(family, config.model, config.lora_layers, (f"{name}.weight" for name in adapter.pairs))
    pairs = _known(adapter, {part.module for part in parts})
    if build.lora_target_modules:
        banned = {name for name in pairs if not _targeted(name, build.lora_target_modules)}
        if banned:
            raise ConfigError(
                f"{adapter.path} changes {_ends(banned)}; the engine was built for lora_target_modules "
                f"{listing(build.lora_target_modules)}"
            )
    factors: dict[str, list[LowRank]] = {}
    starts: Counter[str] = Counter()
    for part in parts:
        pair = pairs.get(part.module)
        if pair is not None:
            _check_shape(adapter, part, pair)
            a, (piece, *_) = pair.a, part.pieces
            if piece.shard == "columns":
                a = shard(a, piece, config.model, parallel)
            b = part.share(pair.b.float() * pair.scaling, config.model, parallel)
            factors.setdefault(part.layer, []).append(LowRank(a, b, starts[part.layer]))
        starts[part.layer] += part.size(config.model, parallel)
    return {layer: tuple(one) for layer, one in factors.items()}


def lora_sizes(family: ModelFamily, config: EngineConfig, parallel: TensorParallel) -> dict[str, tuple[int, ...]]:
    """Output features of each part of the layers that adapters may change, on one rank."""
    sizes: dict[str, tuple[int, ...]] = {}
    for part in lora_parts(family, config.model, config.lora_layers):
        sizes[part.layer] = (*sizes.get(part.layer, ()), part.size(config.model, parallel))
    return sizes


def lora_parts(
    family: ModelFamily, model: ModelConfig, layers: Mapping[str, LoraLayer], names: Iterable[str] = ()
) -> list[LoraPart]:
    """What makes up the layers that adapters may change, in order, by the names of Hugging Face checkpoints.

    ``names`` are tensors of the checkpoint that an adapter was made for, as far as it tells.
    """
    # An engine made of a GGUF file takes the adapters of the same model in Hugging Face's layout.
    known = model.architecture in family.architectures
    view = NamesOnly(model.architecture if known else family.architectures[0], frozenset(names))
    parts = []
    for weight in family.weights(model, view):
        layer = _layer(weight.target)
        if layer not in layers or layer == weight.target:
            continue
        pieces = zip(weight.pieces, layers[layer].rows, strict=True)
        for source, some in groupby(pieces, lambda pair: pair[0].source):
            own, rows = zip(*some, strict=True)
            parts.append(LoraPart(layer, _layer(source), own, rows, layers[layer].inputs))
    return parts


def _known(adapter: PeftAdapter, modules: Collection[str]) -> dict[str, LoraPair]:
    """The adapter's pairs by the family's names, which may begin otherwise than those of the model that was trained."""
    pairs, lost = {}, set()
    for name, pair in adapter.pairs.items():
        near = [one for one in modules if one.endswith(f".{name}") or name.endswith(f".{one}")]
        if name in modules or len(near) == 1:
            pairs[name if name in modules else near[0]] = pair
        else:
            lost.add(name)
    if lost:
        raise CheckpointError(
            f"{adapter.path} changes {listing(sorted(lost)[:3])}, which is no linear layer of this engine; it has "
            f"{_ends(modules)}"
        )
    return pairs


def _check_shape(adapter: PeftAdapter, part: LoraPart, pair: LoraPair) -> None:
    found, wanted = (pair.a.shape[1], pair.b.shape[0]), (part.inputs, sum(part.rows))
    if found != wanted:
        raise CheckpointError(
            f"{adapter.path} is of another model: its {part.module!r} takes {found[0]} features to {found[1]}, the "
            f"engine's takes {wanted[0]} to {wanted[1]}"
        )


def _transformed(piece: Piece, b: torch.Tensor) -> torch.Tensor:
    if piece.transform is None:
        return b
    try:
        out = piece.transform(b.t() if _turns(piece.transform, b.shape[0]) else b)
    except (RuntimeError, IndexError) as error:
        raise _looks_at_inputs(piece, error) from error
    if out.shape[1:] != b.shape[1:]:
        raise _looks_at_inputs(piece, f"it made {list(out.shape)} of {list(b.shape)}")
    return out


def _looks_at_inputs(piece: Piece, why: object) -> PluginContractError:
    return PluginContractError(
        f"the weight map's transform of {piece.source!r} looks at the input axis, so that no adapter can change that "
        f"layer: {why}"
    )


def _outputs(b: torch.Tensor, piece: Piece, config: ModelConfig, parallel: TensorParallel) -> torch.Tensor:
    return b if piece.shard == "columns" else shard(b, piece, config, parallel)


def _turns(transform: Transform, outputs: int) -> bool:
    """Whether a transformation takes the weight as ``[in, out]``, as GPT-2's checkpoints have it.

    The factors are ``[out, rank]`` in any case, so ``fan_in_fan_out`` need not be believed.
    """
    try:
        return transform(torch.empty(outputs, 1, device="meta")).shape[1:] != (1,)
    except (RuntimeError, IndexError):
        return True


def _rows(piece: Piece, shape: tuple[int, ...]) -> int:
    weight = torch.empty(shape, device="meta")
    return (weight if piece.transform is None else piece.transform(weight)).shape[0]


def _layer(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _targeted(module: str, targets: Iterable[str]) -> bool:
    """PEFT's rule for names, classic names included: the whole of it, or its end from a dot on."""
    names = [name for target in targets for name in (target, *CLASSIC.get(target, ()))]
    return any(module == name or module.endswith(f".{name}") for name in names)


def _ends(modules: Iterable[str]) -> str:
    """For a message: the different last parts of the names, and not one for each layer."""
    return listing({module.rsplit(".", 1)[-1] for module in modules})
