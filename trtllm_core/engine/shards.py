"""One rank's parameters, made from a checkpoint by a family's weight map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from trtllm_core.config import ModelConfig
from trtllm_core.errors import CheckpointError, listing
from trtllm_core.parallel import TensorParallel, padded_vocab
from trtllm_core.plugin import CheckpointView, ModelFamily, Piece, Weight


def check_weight_map(family: ModelFamily, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
    """The family's weight map, once every tensor of the checkpoint is used by exactly one weight.

    Raises:
        CheckpointError: naming tensors that are missing, left over or used by several weights.
    """
    weights = family.weights(config, checkpoint)
    used = [source for weight in weights for source in {piece.source for piece in weight.pieces}]
    missing = set(used) - checkpoint.names()
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}, which family {family.name!r} needs")
    left = {name for name in checkpoint.names() - set(used) if not family.unused(name)}
    if left:
        raise CheckpointError(f"family {family.name!r} does not know what to do with {_some(left)}")
    twice = {name for name in used if used.count(name) > 1} if len(set(used)) < len(used) else set()
    if twice:
        raise CheckpointError(f"family {family.name!r} uses {_some(twice)} for more than one parameter")
    return weights


def rank_weights(
    weights: Sequence[Weight], config: ModelConfig, checkpoint: CheckpointView, parallel: TensorParallel
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of one rank, made when it is reached."""
    for weight in weights:
        sources = {name: checkpoint.tensor(name) for name in {piece.source for piece in weight.pieces}}
        pieces = [shard(_transformed(piece, sources[piece.source]), piece, config, parallel) for piece in weight.pieces]
        yield weight.target, pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def shard(tensor: torch.Tensor, piece: Piece, config: ModelConfig, parallel: TensorParallel) -> torch.Tensor:
    """This rank's share of a tensor, as ``piece.shard`` says. Views where possible.

    Raises:
        ConfigError: the size cannot be split over the ranks.
    """
    size = config.head_size
    match piece.shard:
        case "rows":
            return _narrow(tensor, 0, parallel.span(tensor.shape[0]))
        case "columns":
            return _narrow(tensor, 1, parallel.span(tensor.shape[1]))
        case "heads":
            return _narrow(tensor, 0, parallel.span(tensor.shape[0] // size), size)
        case "kv_heads":
            return _narrow(tensor, 0, parallel.kv_span(tensor.shape[0] // size), size)
        case "vocab":
            rows = padded_vocab(config.vocab_size, parallel.size)
            if tensor.shape[0] < rows:
                tensor = torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - tensor.shape[0]))
            return _narrow(tensor, 0, parallel.span(rows))
        case _:
            return tensor


def _transformed(piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if piece.transform is None else piece.transform(tensor)


def _narrow(tensor: torch.Tensor, axis: int, span: range, size: int = 1) -> torch.Tensor:
    return tensor.narrow(axis, span.start * size, len(span) * size)


def _some(names: set[str], most: int = 5) -> str:
    shown = sorted(names)[:most]
    return listing(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
