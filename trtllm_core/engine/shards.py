"""One rank's parameters, made from a checkpoint by a family's weight map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from trtllm_core.checkpoint import Checkpoint
from trtllm_core.config import ModelConfig, Quantization, QuantizedLayer
from trtllm_core.errors import CheckpointError, ConfigError, listing
from trtllm_core.nn.quantized import parameter_name
from trtllm_core.parallel import TensorParallel, padded_vocab
from trtllm_core.plugin import CheckpointView, ModelFamily, Piece, Weight
from trtllm_core.quantize import QuantizedWeight, quantize
from trtllm_core.quantize.gguf import widened


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
    weights: Sequence[Weight],
    config: ModelConfig,
    checkpoint: CheckpointView,
    parallel: TensorParallel,
    quantization: Quantization | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of one rank, made when it is reached. A quantised one comes as its parts.

    Raises:
        ConfigError: the sizes cannot be split over the ranks, or the checkpoint's codes cannot be taken over.
    """
    layers: Mapping[str, QuantizedLayer] = {} if quantization is None else quantization.layers
    for weight in weights:
        layer, name = layers.get(weight.target.removesuffix(".weight")), weight.target.removesuffix("weight")
        how = layer if weight.target.endswith(".weight") else None
        if how is not None and quantization is not None and quantization.weights == "keep":
            yield from _named(name, _kept(weight, how, config, checkpoint, parallel))
            continue
        sources = {name: checkpoint.tensor(name) for name in {piece.source for piece in weight.pieces}}
        pieces = [shard(_transformed(piece, sources[piece.source]), piece, config, parallel) for piece in weight.pieces]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if how is None:
            yield weight.target, whole
        else:
            yield from _named(name, quantize(whole, how))


def _named(prefix: str, weight: QuantizedWeight) -> Iterator[tuple[str, torch.Tensor]]:
    for part, tensor in weight.parts().items():
        yield prefix + parameter_name(part), tensor


def _kept(
    weight: Weight, how: QuantizedLayer, config: ModelConfig, checkpoint: CheckpointView, parallel: TensorParallel
) -> QuantizedWeight:
    """A weight's codes as the checkpoint has them: codes and scales are moved alike, row by row."""
    assert isinstance(checkpoint, Checkpoint), "quantization_of has seen the types of its tensors"
    sources = {name: widened(checkpoint.quantized(name), how) for name in {piece.source for piece in weight.pieces}}
    pieces = [_moved(sources[piece.source], piece, config, parallel) for piece in weight.pieces]
    if len(pieces) == 1:
        return pieces[0]
    return QuantizedWeight(
        how, **{part: torch.cat([one.parts()[part] for one in pieces]) for part in pieces[0].parts()}
    )


def _moved(source: QuantizedWeight, piece: Piece, config: ModelConfig, parallel: TensorParallel) -> QuantizedWeight:
    def move(part: torch.Tensor) -> torch.Tensor:
        rows = part.flatten(1)
        moved = _transformed(piece, rows)
        if moved.shape[1:] != rows.shape[1:]:
            raise ConfigError(
                f"{piece.source!r} is transposed, or else changed within its rows, which its codes cannot follow: "
                "round it anew with int4 or int8 in place of keep"
            )
        return shard(moved.view(-1, *part.shape[1:]), piece, config, parallel)

    return source.map(move)


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
