"""Families that are deliberately wrong, each in one thing: what the conformance kit must catch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from trtllm_core.config import ModelConfig
from trtllm_core.nn import Alibi, alibi_slopes
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import CheckpointView, ModelFamily, ModelFamilyRegistrar, Weight, hookimpl
from trtllm_plugin_bloom.family import BloomFamily
from trtllm_plugin_llama.family import LlamaFamily


class Wrong(LlamaFamily):
    """LLaMA with a changed weight map."""

    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        return [self.change(weight) for weight in super().weights(config, checkpoint) if self.keep(weight)]

    def keep(self, weight: Weight) -> bool:
        return True

    def change(self, weight: Weight) -> Weight:
        return weight


def with_piece(weight: Weight, index: int, **changes: object) -> Weight:
    pieces = list(weight.pieces)
    pieces[index] = replace(pieces[index], **changes)  # type: ignore[arg-type]
    return Weight(weight.target, tuple(pieces))


class SwappedHalves(Wrong):
    """The halves of each key head change places, so that keys are rotated the other way round."""

    def change(self, weight: Weight) -> Weight:
        def swap(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(0, (-1, 2, 8)).flip(1).flatten(0, 2)

        return with_piece(weight, 1, transform=swap) if ".qkv." in weight.target else weight


class MissingBias(Wrong):
    """The module has no bias on queries, keys and values, and the map passes over the checkpoint's."""

    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        config = super().config(checkpoint)
        return config.replace(extras={**config.extras, "qkv_bias": False})

    def unused(self, name: str) -> bool:
        return name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))


class TakesAnything(Wrong):
    """What it does not know, it drops."""

    def unused(self, name: str) -> bool:
        return True


class ZeroedBias(Wrong):
    """A bias is there, filled and counted, but its values are lost."""

    def change(self, weight: Weight) -> Weight:
        return with_piece(weight, 2, transform=torch.zeros_like) if weight.target.endswith("qkv.bias") else weight


class ForgottenParameter(Wrong):
    """A norm stays as memory happened to be; its tensor counts as unused."""

    def keep(self, weight: Weight) -> bool:
        return weight.target != "layers.0.mlp_norm.weight"

    def unused(self, name: str) -> bool:
        return name.endswith("layers.0.post_attention_layernorm.weight")


class WholeOutput(Wrong):
    """Right on one rank; on two, each has all input features of the MLP's last product."""

    def change(self, weight: Weight) -> Weight:
        return with_piece(weight, 0, shard="whole") if weight.target.endswith("down.weight") else weight


class ReorderedInputs(Wrong):
    """Features between the MLP's products stand in another order: right, but for adapters, whose inputs stay."""

    def change(self, weight: Weight) -> Weight:
        if weight.target.endswith("gate_up.weight"):
            return with_piece(with_piece(weight, 0, transform=backwards), 1, transform=backwards)
        if weight.target.endswith("down.weight"):
            return with_piece(weight, 0, transform=lambda tensor: tensor.flip(1))
        return weight


class SizedTransform(Wrong):
    """Right, but for adapters: a transform that asks for all input features."""

    def change(self, weight: Weight) -> Weight:
        if not weight.target.endswith("attention.output.weight"):
            return weight
        return with_piece(weight, 0, transform=lambda tensor: tensor.view(64, 64))


def backwards(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0)


class WrongEpsilon(Wrong):
    """Norms divide by a little more than they should."""

    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        config = super().config(checkpoint)
        return config.replace(extras={**config.extras, "norm_eps": 1e-3})


class NoResidual(Wrong):
    """The last layer's MLP is not added to what it was given."""

    def module(self, config: ModelConfig, parallel: TensorParallel) -> nn.Module:  # type: ignore[override]
        module = super().module(config, parallel)
        last = module.layers[-1]

        def forward(x: torch.Tensor, *context: object) -> torch.Tensor:
            x = x + last.attention(last.attention_norm(x), *context)
            return last.mlp(last.mlp_norm(x))

        last.forward = forward
        return module


class SlopesOfOneRank(BloomFamily):
    """Right on one rank; on two, each counts its heads from 0, so that the second has the first one's slopes."""

    def module(self, config: ModelConfig, parallel: TensorParallel) -> nn.Module:  # type: ignore[override]
        module = super().module(config, parallel)
        (alibi,) = {layer for layer in module.modules() if isinstance(layer, Alibi)}
        alibi.slopes = alibi_slopes(config.num_heads)[: len(alibi.slopes)]
        return module


class SlopesInReverse(BloomFamily):
    """The last head falls as fast as the first should."""

    def module(self, config: ModelConfig, parallel: TensorParallel) -> nn.Module:  # type: ignore[override]
        module = super().module(config, parallel)
        (alibi,) = {layer for layer in module.modules() if isinstance(layer, Alibi)}
        alibi.slopes = alibi.slopes[::-1]
        return module


class OwnEmbedding(Wrong):
    """Rows of the embedding are looked up past the layer, so that nothing can stand in their place."""

    def module(self, config: ModelConfig, parallel: TensorParallel) -> nn.Module:  # type: ignore[override]
        module = super().module(config, parallel)
        if parallel.size == 1:
            module.embedding.forward = lambda ids: nn.functional.embedding(ids, module.embedding.weight)
        return module


class Plugin:
    """Registers one broken family in place of the right one."""

    hook_api = "model_family>=1.0,<2"

    def __init__(self, family: type[ModelFamily]) -> None:
        self._family = family

    @hookimpl
    def trtllm_register_model_families(self, registrar: ModelFamilyRegistrar) -> None:
        registrar.add(self._family.name, self._family, architectures=self._family.architectures)


swapped_halves = Plugin(SwappedHalves)
missing_bias = Plugin(MissingBias)
takes_anything = Plugin(TakesAnything)
zeroed_bias = Plugin(ZeroedBias)
forgotten_parameter = Plugin(ForgottenParameter)
whole_output = Plugin(WholeOutput)
reordered_inputs = Plugin(ReorderedInputs)
sized_transform = Plugin(SizedTransform)
own_embedding = Plugin(OwnEmbedding)
wrong_epsilon = Plugin(WrongEpsilon)
no_residual = Plugin(NoResidual)
slopes_of_one_rank = Plugin(SlopesOfOneRank)
slopes_in_reverse = Plugin(SlopesInReverse)
