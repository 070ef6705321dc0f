"""Logits processors that look at no text: log-probabilities, a bias, temperature, a minimum length."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding.bans import lower
from trtllm_core.decoding.history import generated
from trtllm_core.decoding.state import SlotTable, copy_slots, per_row
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.logits import DeviceLogitsProcessor, LogitsCapabilities, Phase

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, DecodingContext, LogitsBatch


class LogSoftmax(DeviceLogitsProcessor):
    """``x − log Σ exp x``: logits become log-probabilities, before all else. For searches that add them up."""

    phase = Phase.BIAS
    before = ("embedding_bias",)
    capabilities = LogitsCapabilities(argmax_invariant=True, speculation="per_position", graph_safe=True)

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        logits.sub_(torch.where(batch.active, logits.logsumexp(dim=1), 0.0).unsqueeze(1))


class EmbeddingBias(DeviceLogitsProcessor):
    """``x[token] += bias`` for the tokens of ``embedding_bias``.

    That names some tokens, or has a number for each of the vocabulary, of which those that are not 0 are kept.
    """

    phase = Phase.BIAS
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True)
    examples = (Example(sampling={"embedding_bias": {5: 1.0, 9: -2.0}}),)

    _tokens: SlotTable
    _biases: SlotTable

    def setup(self, context: DecodingContext) -> None:
        self._vocab_size = context.vocab_size
        self._tokens = SlotTable(context.slots, context.device, fill=0)
        self._biases = SlotTable(context.slots, context.device, fill=0.0, dtype=torch.float32)

    @property
    def graph_key(self) -> Hashable:
        return self._tokens.shape

    def begin(self, slot: int, view: BranchView) -> None:
        bias = view.sampling.embedding_bias or {}
        if isinstance(bias, tuple):
            if len(bias) != self._vocab_size:
                raise ConfigError(
                    f"embedding_bias has {len(bias)} numbers for {self._vocab_size} tokens: give one each"
                )
            bias = {token: value for token, value in enumerate(bias) if value}
        if wrong := [token for token in bias if not 0 <= token < self._vocab_size]:
            raise ConfigError(f"embedding_bias: token {wrong[0]} is not in the vocabulary of {self._vocab_size} tokens")
        self._tokens.write(slot, list(bias.keys()))
        self._biases.write(slot, list(bias.values()))

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        # Padding adds 0 to token 0.
        biases = torch.where(batch.active.unsqueeze(1), self._biases.rows.index_select(0, batch.slot), 0.0)
        logits.scatter_add_(1, self._tokens.rows.index_select(0, batch.slot), biases)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._tokens.rows, self._biases.rows)


class Temperature(DeviceLogitsProcessor):
    """``x · 1 / (temperature + 1e-6)``, the classic runtime's formula; in preset ``hf``, ``x / temperature``.

    A temperature of 0 means a greedy choice, which is the plan's to make: here it is 1, as in the classic runtime.
    """

    phase = Phase.TEMPERATURE
    capabilities = LogitsCapabilities(argmax_invariant=True, speculation="per_position", graph_safe=True)
    examples = (Example(sampling={"temperature": 0.7}), Example(sampling={"temperature": 1.5}))

    _scale: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._scale = torch.ones(context.slots, device=context.device)

    def begin(self, slot: int, view: BranchView) -> None:
        temperature = view.sampling.temperature or 1.0
        self._scale[slot].fill_(1.0 / (temperature if view.sampling.preset == "hf" else temperature + 1e-6))

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        logits.mul_(per_row(self._scale, batch, neutral=1.0))

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._scale)


class MinLength(DeviceLogitsProcessor):
    """Lowers all end tokens while the text is too short: to -FLT_MAX, in preset ``hf`` to -inf. Stop words stay.

    It is too short with fewer generated tokens than ``min_length``, or fewer in all than ``min_sequence_length``.
    """

    phase = Phase.CONSTRAINT
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True)
    examples = (Example(sampling={"min_length": 6}),)

    _min_length: torch.Tensor
    _lowest: torch.Tensor
    _end_ids: SlotTable

    def setup(self, context: DecodingContext) -> None:
        self._min_length = torch.zeros(context.slots, dtype=torch.int64, device=context.device)
        self._lowest = torch.zeros(context.slots, device=context.device)
        self._end_ids = SlotTable(context.slots, context.device, fill=-1)

    @property
    def graph_key(self) -> Hashable:
        return self._end_ids.shape

    def begin(self, slot: int, view: BranchView) -> None:
        sampling = view.sampling
        self._min_length[slot].fill_(max(sampling.min_length, sampling.min_sequence_length - len(view.prompt)))
        self._lowest[slot].fill_(-torch.inf if sampling.preset == "hf" else torch.finfo(torch.float32).min)
        self._end_ids.write(slot, view.end_ids)

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        early = generated(batch).unsqueeze(1) < per_row(self._min_length, batch, neutral=0)
        lower(
            logits,
            self._end_ids.rows.index_select(0, batch.slot),
            early,
            self._lowest.index_select(0, batch.slot).unsqueeze(1),
        )

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._min_length, self._lowest, self._end_ids.rows)
