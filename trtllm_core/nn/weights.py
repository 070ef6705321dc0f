"""Words for weight maps: how tensors of checkpoints become the parameters of these layers.

Transforms look at the output axis of a weight or a bias and take any input axis, as ``Piece.transform`` asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from trtllm_core.plugin import Piece, Weight

if TYPE_CHECKING:
    import torch

Transform = Callable[["torch.Tensor"], "torch.Tensor"]
Shard = Literal["whole", "rows", "columns", "heads", "kv_heads", "vocab"]


def linear(
    target: str, source: str, shard: Shard = "whole", *, bias: bool = False, transform: Transform | None = None
) -> list[Weight]:
    """``target.weight`` of ``source.weight``, and the bias. Split by ``columns``, a layer has its bias whole."""
    of_bias: Shard = "whole" if shard == "columns" else shard
    shards: list[tuple[str, Shard]] = [("weight", shard), ("bias", of_bias)]
    return [
        Weight(f"{target}.{name}", (Piece(f"{source}.{name}", how, transform),)) for name, how in shards[: 1 + bias]
    ]


def fused(target: str, pieces: list[Piece], *, bias: bool = False) -> list[Weight]:
    """``target.weight`` of several layers' weights, or parts of one's, along the output axis; and the bias.

    ``Piece.source`` is the name of a layer, without ``.weight``.
    """
    return [
        Weight(
            f"{target}.{name}",
            tuple(Piece(f"{piece.source}.{name}", piece.shard, piece.transform) for piece in pieces),
        )
        for name in ("weight", "bias")[: 1 + bias]
    ]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """``[in, out] -> [out, in]``: how GPT-2 stores its weights. A bias stays."""
    return tensor.t()


def rows(first: int, count: int) -> Transform:
    """``count`` output features from ``first`` on: one of several layers, fused one after another."""

    def take(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(0, first, count)

    return take


def of_each_head(part: int, parts: int, head_size: int) -> Transform:
    """Part ``part`` of every head, of layers fused head by head: ``[heads * parts * head_size, ...]``."""

    def take(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.view(-1, parts, head_size, *tensor.shape[1:])
        return heads[:, part].flatten(0, 1)

    return take


def halves(head_size: int, dim: int | None = None) -> Transform:
    """Neighbours (2i, 2i + 1) of the first ``dim`` elements of each head become partners (i, i + dim / 2).

    For queries and keys of models that rotate neighbours: ``RotaryEmbedding`` rotates halves. Scores do not change
    when queries and keys are reordered alike.
    """
    dim = head_size if dim is None else dim
    order = [*range(0, dim, 2), *range(1, dim, 2), *range(dim, head_size)]

    def reorder(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.view(-1, head_size, *tensor.shape[1:])
        return heads[:, order].flatten(0, 1)

    return reorder


def chain(*transforms: Transform) -> Transform:
    """One after another."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        for transform in transforms:
            tensor = transform(tensor)
        return tensor

    return apply
