"""What quantised weights cost: the same text, through a model with them and through one without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtllm_core.backends.linear.judge import packed_logits
from trtllm_core.backends.modules import meta_module, parameter_dtypes
from trtllm_core.backends.torch.backend import TorchBackend
from trtllm_core.backends.torch.cpu.rounding import measure_rounding
from trtllm_core.backends.torch.executable import TorchExecutable
from trtllm_core.backends.torch.quantized import RoundedProduct
from trtllm_core.checkpoint import Checkpoint
from trtllm_core.config import EngineConfig
from trtllm_core.engine.shards import check_weight_map, rank_weights
from trtllm_core.errors import ConfigError
from trtllm_core.nn import Linear
from trtllm_core.nn.quantized import weight_of
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import ModelFamily

MOST = 512
"""Tokens of the text that are run at most."""


@dataclass(frozen=True)
class QuantizationCost:
    """Over a text, in the engine's dtype on the CPU."""

    tokens: int
    """That were predicted."""
    perplexity: float
    plain_perplexity: float
    """With weights in the engine's dtype."""
    error: float
    """Root of the mean square of the logits' differences, each row of logits less its mean."""
    spread: float
    """Standard deviation of the plain logits, to compare it with."""
    rounded_perplexity: float | None = None
    """Of fp8 weights, with activations rounded to fp8 as well: what a GPU does with prompts and large batches."""
    int8_perplexity: float | None = None
    """With activations rounded to int8 as well: what this machine's kernels do while few rows run, if they do."""
    int8_error: float | None = None
    """Like ``error``: how far that alone moves the logits."""


def quantization_cost(
    config: EngineConfig, family: ModelFamily, checkpoint: Checkpoint, ids: Sequence[int]
) -> QuantizationCost:
    """Run a text's tokens, the first ``MOST`` of them, through both models, one after the other.

    What a backend adds of its own is not in it, but for activations that the torch backend rounds: beside fp8 weights
    on a GPU, and beside codes on a CPU that multiplies bytes.

    Raises:
        ConfigError: the text is shorter than two tokens.
    """
    most = min(MOST, config.build.max_seq_len, config.build.max_num_tokens)
    text = torch.tensor(ids[:most])
    if len(text) < 2:
        raise ConfigError("the text of --quant-text has less than two tokens: there is nothing to predict")
    config = config.replace(build=config.build.replace(tp_size=1))  # one rank has all of the model
    plain = _logits(config.replace(quantization=None), family, checkpoint, text)
    ours = _logits(config, family, checkpoint, text)
    float8 = config.quantization is not None and config.quantization.weights == "fp8"
    rounded = _logits(config, family, checkpoint, text, rounded=True) if float8 else None
    int8 = measure_rounding(_engine(config, family, checkpoint, int8_activations=None), text)
    difference = ours - plain
    return QuantizationCost(
        tokens=len(text) - 1,
        perplexity=_perplexity(ours, text),
        plain_perplexity=_perplexity(plain, text),
        error=(difference - difference.mean(-1, keepdim=True)).square().mean().sqrt().item(),
        spread=(plain - plain.mean(-1, keepdim=True)).square().mean().sqrt().item(),
        rounded_perplexity=None if rounded is None else _perplexity(rounded, text),
        int8_perplexity=None if int8 is None else _perplexity(int8.rounded, text),
        int8_error=None if int8 is None else int8.error,
    )


def _logits(
    config: EngineConfig, family: ModelFamily, checkpoint: Checkpoint, text: torch.Tensor, rounded: bool = False
) -> torch.Tensor:
    """float32 ``[tokens - 1, vocab]``: what predicts each token but the first. ``rounded``: activations are as well."""
    engine = _engine(config, family, checkpoint)
    if rounded:
        for layer in engine.module.modules():
            if isinstance(layer, Linear) and layer.quantized is not None:
                layer.matmul = RoundedProduct(weight_of(layer))
    return packed_logits(engine, [text], [1])[0, :, : config.model.vocab_size]


def _engine(
    config: EngineConfig, family: ModelFamily, checkpoint: Checkpoint, int8_activations: bool | None = False
) -> TorchExecutable:
    rank = TensorParallel()
    dtypes = parameter_dtypes(meta_module(config, family, rank))
    parts = rank_weights(
        check_weight_map(family, config.model, checkpoint), config.model, checkpoint, rank, config.quantization
    )
    tensors = {name: tensor.to(dtypes[name]).contiguous() for name, tensor in parts}
    return TorchBackend().assemble(
        tensors, config, family, torch.device("cpu"), rank, int8_activations=int8_activations
    )


def _perplexity(logits: torch.Tensor, text: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits, text[1:]).exp().item()
