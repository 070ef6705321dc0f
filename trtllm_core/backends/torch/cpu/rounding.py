"""What rounding activations to 8 bits costs: the same tokens, few at a time, with it and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trtllm_core.backends.torch.cpu.layers import packed_products
from trtllm_core.backends.torch.cpu.product import DIRECT_UP_TO, PackedProduct
from trtllm_core.backends.torch.executable import TorchExecutable
from trtllm_core.plugin.kv_policy import KVModel, KVPlan


@dataclass(frozen=True)
class Rounding:
    """Logits of a text, float32 ``[tokens - 1, vocab]``: what predicts each token but the first."""

    rounded: torch.Tensor
    exact: torch.Tensor

    @property
    def error(self) -> float:
        """Root of the mean square of the logits' differences, each row of logits less its mean."""
        return _spread(self.rounded - self.exact)

    @property
    def spread(self) -> float:
        """Standard deviation of the exact logits, to compare it with."""
        return _spread(self.exact)


def measure_rounding(engine: TorchExecutable, text: torch.Tensor) -> Rounding | None:
    """Run ``text [tokens]``, at least two, through the products of few rows; None: the engine's round nothing.

    Nothing may be in the engine's KV cache yet: it is written over, up to its end. An engine without one gets one.
    """
    products = [one for one in packed_products(engine.module) if one.rounds]
    if not products:
        return None
    if engine.kv_plan is None:
        engine.allocate_kv(_plan(engine, len(text)))
    rounded = _logits(engine, text)
    with _exact(products):
        return Rounding(rounded, _logits(engine, text))


@contextmanager
def _exact(products: list[PackedProduct]) -> Iterator[None]:
    for product in products:
        product.rounds = False
    try:
        yield
    finally:
        for product in products:
            product.rounds = True


def _plan(engine: TorchExecutable, tokens: int) -> KVPlan:
    model, size = engine.config.model, engine.config.build.tokens_per_block
    blocks, per_token = -(-tokens // size), model.kv_bytes_per_token(model.dtype)
    return KVPlan(
        blocks, size, blocks, KVModel(model.num_layers, model.num_kv_heads, model.head_size, model.dtype, per_token)
    )


def _logits(engine: TorchExecutable, text: torch.Tensor) -> torch.Tensor:
    plan = engine.kv_plan
    assert plan is not None
    blocks = torch.arange(min(plan.num_blocks, plan.max_blocks_per_slot), dtype=torch.int32)
    count = min(len(text), len(blocks) * plan.tokens_per_block)
    out = torch.empty(count, engine.config.vocab_size_padded)
    for first in range(0, count, DIRECT_UP_TO):
        some = torch.arange(first, min(first + DIRECT_UP_TO, count))
        inputs = {
            "input_ids": text[some].int(),
            "position_ids": some,
            "query_lengths": torch.tensor([len(some)], dtype=torch.int32),
            "past_lengths": torch.tensor([first], dtype=torch.int32),
            "block_tables": blocks[None],
            "logits_indices": some - first,
        }
        engine.execute(inputs, {"logits": out[some[0] : some[-1] + 1]}, 0)
    return out[:-1, : engine.config.model.vocab_size]


def _spread(logits: torch.Tensor) -> float:
    return (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt().item()
