"""Mirostat, version 2: sampling that holds the surprise of its tokens near a target."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, Field

from trtllm_core.decoding.random import batch_uniform, draw_salt
from trtllm_core.decoding.ranking import masses
from trtllm_core.decoding.samplers import draw, possible
from trtllm_core.decoding.state import copy_slots
from trtllm_core.plugin.decoder import DecoderCapabilities, Sampler

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, DecodingContext, LogitsBatch


class Mirostat(Sampler):
    """Mirostat 2.0 (Basu and others 2021), as it is commonly run.

    Tokens whose surprise ``−log2 p`` is above ``mu`` are left out, but for the likeliest one, and one of the rest is
    drawn. With ``s`` its surprise among the rest, ``mu ← mu − eta·(s − tau)``; it starts at ``2·tau``.

    ``mu`` is kept for each length of the text: what it will be with the drawn token is written behind the text, as the
    token itself is, and counts once that does. So a rewind finds the old one, and there is nothing to do in ``commit``.
    Each token's mu depends on the one before it, so that drafts cannot be verified side by side.
    """

    class Params(BaseModel, extra="forbid", frozen=True):
        """Target and rate."""

        tau: float = Field(default=5.0, gt=0, description="target surprise, in bits")
        eta: float = Field(default=0.1, ge=0, le=1, description="how fast mu follows")

    capabilities = DecoderCapabilities(graph_safe=True)

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
        self._tau[slot], self._eta[slot] = view.params.tau, view.params.eta
        self._mu[slot, len(view.prompt)] = 2 * view.params.tau

    def sample(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        slot = batch.slot
        length = batch.context.lengths[slot]
        mu = self._mu[slot, length].unsqueeze(1)
        least = logits.logsumexp(dim=1, keepdim=True) - mu * math.log(2)
        dropped = logits < torch.minimum(least, logits.amax(dim=1, keepdim=True))
        sums = masses(logits).masked_fill_(dropped, 0)
        tokens = draw(sums, batch_uniform(batch, self.SALT).unsqueeze(1))
        before = torch.where(tokens > 0, sums.gather(1, (tokens - 1).clamp(min=0)), 0)
        surprise = torch.log2(sums[:, -1:].float() / (sums.gather(1, tokens) - before).float())
        mu = mu.squeeze(1) - self._eta[slot] * (surprise.squeeze(1) - self._tau[slot])
        after = (slot, length + 1)
        self._mu.index_put_(after, torch.where(batch.active, mu, self._mu[after]))
        return possible(logits, tokens.squeeze(1))

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._mu, self._tau, self._eta)
