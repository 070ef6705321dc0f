"""N-gram speculation (prompt lookup): what followed the text's last tokens before is proposed to follow them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import Field, model_validator

from trtllm_core.config import Config
from trtllm_core.decoding.history import recent, texts
from trtllm_core.decoding.verifying import accept_equal
from trtllm_core.plugin.decoder import BranchPlan, Decoder, DecoderCapabilities, Proposal, Selection

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, DecodingContext, LogitsBatch


class NGramParams(Config):
    """Parameters of ``ngram``."""

    tokens: int = Field(default=8, ge=1, le=128, description="most drafts a step")
    longest: int = Field(default=3, ge=1, le=16, description="of the n-grams that are looked up, the longest first")
    shortest: int = Field(default=1, ge=1, le=16)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"shortest ({self.shortest}) is above longest ({self.longest})")
        return self


class NGram(Decoder):
    """Samples as the request would without it, token for token: a draft is accepted when the sampler takes it.

    The last place is looked up at which the longest possible n-gram at the end of the text, prompt included, stood
    before, and what followed it there is proposed.
    """

    Params = NGramParams
    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities(
        needs=frozenset({"sampler", "multi_position", "kv_rewind"})
    )

    def setup(self, context: DecodingContext) -> None:
        """See ``SlotPlugin``, as what follows."""
        self._ones = torch.ones(context.slots, dtype=torch.int64, device=context.device)
        self._params: dict[int, NGramParams] = {}

    def plan(self, view: BranchView) -> BranchPlan:
        count = view.sampling.num_return_sequences
        return BranchPlan(count, count, 1 + view.params.tokens, count)

    def begin(self, slot: int, view: BranchView) -> None:
        self._params[slot] = view.params

    def end(self, slot: int) -> None:
        self._params.pop(slot, None)

    def propose(self, batch: LogitsBatch) -> Proposal:
        params = [self._params[slot] for slot in batch.slot.tolist()]
        device = batch.slot.device
        longest, shortest, most = (
            torch.tensor([getattr(each, name) for each in params], device=device)
            for name in ("longest", "shortest", "tokens")
        )
        text, end = texts(batch)
        column = torch.arange(text.shape[1], device=device)
        widest = int(max(each.longest for each in params))
        last = recent(batch, widest)
        # same[:, p]: how many tokens up to p equal those at the end of the text.
        same = torch.zeros_like(text)
        still = column < (end - 1).unsqueeze(1)
        for back in range(widest):
            still = still & (text.roll(back, dims=1) == last[:, back, None]) & (column >= back)
            still &= back < longest.unsqueeze(1)
            same += still
        found = same.masked_fill(same < shortest.unsqueeze(1), 0)
        # The longest match, and of those the last.
        at = (found * (text.shape[1] + 1) + column).masked_fill(found == 0, -1).max(dim=1)
        k = max(each.tokens for each in params)
        place = at.indices.unsqueeze(1) + 1 + torch.arange(k, device=device)
        counts = torch.where(at.values < 0, 0, torch.minimum(end - at.indices - 1, most))
        return Proposal(text.gather(1, place.clamp(max=text.shape[1] - 1)), counts)

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection:
        tokens = self.host.sample(logits, batch)
        if batch.starts is not None:
            return accept_equal(tokens, batch)
        return Selection(tokens.unsqueeze(1), self._ones[: len(tokens)])
