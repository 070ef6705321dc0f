"""Repetition, presence and frequency penalties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding.history import texts
from trtllm_core.decoding.state import accepted, copy_slots, per_row
from trtllm_core.plugin.logits import DeviceLogitsProcessor, LogitsCapabilities, Phase

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch


class Penalties(DeviceLogitsProcessor):
    """The three penalties in one pass, for each token that occurs ``c > 0`` times in the text:

    ``x = x·r if x < 0 else x/r`` (repetition), then ``x −= p`` (presence), then ``x −= f·c`` (frequency). Prompt
    tokens count, but for the first ``prompt_ignore_length``. In a verify step the drafts before a position count too.

    Only tokens of the text can change, so only they are gathered, changed and written back: the work grows with
    ``max_seq_len`` and not with the vocabulary. A token that occurs twice is written twice, with the same value.
    """

    phase = Phase.PENALTY
    capabilities = LogitsCapabilities(speculation="rewind", graph_safe=True)

    _counts: torch.Tensor
    _repetition: torch.Tensor
    _presence: torch.Tensor
    _frequency: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._context = context
        shape = (context.slots, context.vocab_size_padded)
        self._counts = torch.zeros(shape, dtype=torch.int32, device=context.device)
        self._repetition = torch.ones(context.slots, device=context.device)
        self._presence = torch.zeros(context.slots, device=context.device)
        self._frequency = torch.zeros(context.slots, device=context.device)

    def begin(self, slot: int, view: BranchView) -> None:
        sampling = view.sampling
        self._repetition[slot] = sampling.repetition_penalty
        self._presence[slot] = sampling.presence_penalty
        self._frequency[slot] = sampling.frequency_penalty
        prompt = torch.tensor(view.prompt[sampling.prompt_ignore_length :], dtype=torch.int64)
        width = self._counts.shape[1]
        prompt = prompt[prompt < width]  # ids above it stand for embeddings (prompt tuning), not for tokens
        self._counts[slot] = torch.bincount(prompt, minlength=width).to(self._counts)

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        tokens = texts(batch)[0].clamp_(max=logits.shape[1] - 1)
        count = self._counts[batch.slot.unsqueeze(1), tokens]
        if batch.draft is not None:
            draft = batch.draft[batch.slot]
            before = torch.arange(draft.shape[1], device=draft.device) < batch.offset.unsqueeze(1)
            count = count + ((tokens.unsqueeze(2) == draft.unsqueeze(1)) & before.unsqueeze(1)).sum(2)
        r = per_row(self._repetition, batch, neutral=1.0)
        p = per_row(self._presence, batch, neutral=0.0)
        f = per_row(self._frequency, batch, neutral=0.0)
        x = logits.gather(1, tokens)
        penalised = torch.where(x < 0, x * r, x / r) - p - f * count
        logits.scatter_(1, tokens, torch.where(count > 0, penalised, x))

    def commit(self, batch: CommitBatch) -> None:
        counted = accepted(batch)
        tokens = torch.where(counted, batch.tokens, 0)  # what is not counted adds 0 to token 0
        self._add(batch.slot.unsqueeze(1), tokens, counted)

    def rewind(self, slot: int, n: int) -> None:
        # The tokens that are taken back still stand behind the text.
        context = self._context
        index = context.lengths[slot] + torch.arange(n, device=context.device)
        tokens = context.tokens[slot].gather(0, index).long()
        self._add(torch.full_like(tokens, slot), tokens, -torch.ones_like(tokens))

    def _add(self, slot: torch.Tensor, tokens: torch.Tensor, amount: torch.Tensor) -> None:
        flat = slot * self._counts.shape[1] + tokens
        self._counts.view(-1).scatter_add_(0, flat.view(-1), amount.to(self._counts.dtype).view(-1))

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._counts, self._repetition, self._presence, self._frequency)
