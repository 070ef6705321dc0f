"""Mirostat, version 2: sampling that holds the surprise of its tokens near a target."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, Field

from trtllm_core.decoding.random import batch_uniform, draw_salt
from trtllm_core.decoding.ranking import masses
from trtllm_core.decoding.samplers import draw, possible
from trtllm_core.decoding.state import accepted, copy_slots
from trtllm_core.plugin.decoder import DecoderCapabilities, Sampler
from trtllm_core.plugin.lifecycle import Example

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch


class Mirostat(Sampler):
    """Mirostat 2.0 (Basu and others 2021), as it is commonly run.

    Tokens whose surprise ``−log2 p`` is above ``mu`` are left out, but for the likeliest one, and one of the rest is
    drawn. With ``s`` its surprise among the rest, ``mu ← mu − eta·(s − tau)``; it starts at ``2·tau``.

    ``mu`` is kept for each length of the text, so that a rewind finds the old one. It moves in ``commit``, from the
    logits that the token was drawn from; a token that could not be drawn, which somebody else put there, leaves it as
    it is. Each token's mu depends on the one before it, so that drafts cannot be verified side by side.
    """

    examples = (Example(), Example({"tau": 1.0, "eta": 0.5}))

    class Params(BaseModel, extra="forbid", frozen=True):
        """Target and rate."""

        tau: float = Field(default=5.0, gt=0, description="target surprise, in bits")
        eta: float = Field(default=0.1, ge=0, le=1, description="how fast mu follows")

    capabilities = DecoderCapabilities(graph_safe=True, needs=frozenset({"logits"}))

    SALT = draw_salt("mirostat")

    _mu: torch.Tensor
    _tau: torch.Tensor
    _eta: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        slots, device = context.slots, context.device
        self._mu = torch.zeros(slots, context.max_seq_len + 1, device=device)
        """float32 ``[slots, max_seq_len + 1]``: mu of a text of so many tokens."""
        self._tau = torch.zeros(slots, device=device)
        self._eta = torch.zeros(slots, device=device)

    def begin(self, slot: int, view: BranchView) -> None:
        self._tau[slot].fill_(view.params.tau)
        self._eta[slot].fill_(view.params.eta)
        self._mu[slot, len(view.prompt)].fill_(2 * view.params.tau)

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        dropped = _surprising(logits, self._mu[batch.slot, batch.context.lengths[batch.slot]])
        weights = masses(logits).masked_fill_(dropped, 0)
        tokens = draw(weights, batch_uniform(batch, self.SALT).unsqueeze(1))
        return possible(logits, tokens.squeeze(1))

    def commit(self, batch: CommitBatch) -> None:
        assert batch.logits is not None
        assert batch.source is not None
        slot, keep = batch.slot, accepted(batch)
        before = batch.context.lengths[slot] - batch.counts
        mu = self._mu[slot, before]
        for j in range(batch.tokens.shape[1]):
            logits = batch.logits[batch.source[:, j]]
            rest = logits.masked_fill(_surprising(logits, mu), -torch.inf)
            token = batch.tokens[:, j : j + 1].clamp(0, logits.shape[1] - 1)
            surprise = (rest.logsumexp(dim=1) - rest.gather(1, token).squeeze(1)) / math.log(2)
            drawn = keep[:, j] & (surprise < torch.inf)
            mu = torch.where(drawn, mu - self._eta[slot] * (surprise - self._tau[slot]), mu)
            # A row without a j-th token writes back what is there, so that shapes never depend on the data.
            at = (slot, (before + j + 1).clamp(max=self._mu.shape[1] - 1))
            self._mu.index_put_(at, torch.where(keep[:, j], mu, self._mu[at]))

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._mu, self._tau, self._eta)


def _surprising(logits: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """bool ``[n, vocab]``: tokens whose surprise is above ``mu`` (float32 ``[n]``, in bits), but for the likeliest."""
    least = logits.logsumexp(dim=1) - mu * math.log(2)
    return logits < torch.minimum(least, logits.amax(dim=1)).unsqueeze(1)
