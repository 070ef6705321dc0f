"""Repetition, presence and frequency penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding.history import texts
from trtllm_core.decoding.state import accepted, copy_slots, per_row
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.logits import DeviceLogitsProcessor, LogitsCapabilities, Phase

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch


_IGNORED = 1 << 24
"""Added to the count of a token that occurs among the first ``prompt_ignore_length``: more than any text is long."""


class Penalties(DeviceLogitsProcessor):
    """The three penalties in one pass, for each token of the text, prompt included:

    ``x = x·r if x < 0 else x/r`` (repetition), and where it occurs ``c > 0`` times after the first
    ``prompt_ignore_length`` tokens of the prompt, ``x −= p`` (presence) and ``x −= f·c`` (frequency). In a verify step
    the drafts before a position count too.

    Only tokens of the text can change, so only they are gathered, changed and written back: the work grows with
    ``max_seq_len`` and not with the vocabulary. A token that occurs twice is written twice, with the same value.
    """

    phase = Phase.PENALTY
    capabilities = LogitsCapabilities(speculation="rewind", graph_safe=True)
    examples = (
        Example(
            sampling={
                "repetition_penalty": 1.3,
                "presence_penalty": 0.2,
                "frequency_penalty": 0.4,
                "prompt_ignore_length": 2,
            }
        ),
        Example(sampling={"frequency_penalty": -0.3}),
    )

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
        self._repetition[slot].fill_(sampling.repetition_penalty)
        self._presence[slot].fill_(sampling.presence_penalty)
        self._frequency[slot].fill_(sampling.frequency_penalty)
        ignored, counted = (
            self._occurrences(part)
            for part in (view.prompt[: sampling.prompt_ignore_length], view.prompt[sampling.prompt_ignore_length :])
        )
        counts = (counted + (ignored > 0) * _IGNORED).to(self._counts.dtype)
        self._counts[slot].copy_(counts, non_blocking=True)

    def _occurrences(self, tokens: Sequence[int]) -> torch.Tensor:
        width = self._counts.shape[1]
        ids = torch.tensor(tokens, dtype=torch.int64)
        # Ids above the vocabulary stand for embeddings (prompt tuning), not for tokens.
        return torch.bincount(ids[ids < width], minlength=width)

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
        seen, count = count > 0, count & (_IGNORED - 1)
        penalised = torch.where(x < 0, x * r, x / r) - p * (count > 0) - f * count
        logits.scatter_(1, tokens, torch.where(seen, penalised, x))

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
