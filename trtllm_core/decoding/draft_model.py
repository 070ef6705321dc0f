"""Speculation with a draft model: a small engine guesses, the large one accepts with the probability that keeps its own
distribution (Leviathan et al. 2023; Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import ConfigDict, Field

from trtllm_core.config import Config
from trtllm_core.decoding.draft_runs import DraftRuns
from trtllm_core.decoding.random import batch_uniform, draw_salt
from trtllm_core.decoding.samplers import possible
from trtllm_core.decoding.verifying import draw_from, positions_of, verified
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.decoder import BranchPlan, Decoder, DecoderCapabilities, Proposal, Selection
from trtllm_core.plugin.views import LogitsBatch
from trtllm_core.session import Session

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext


class DraftModelParams(Config):
    """Parameters of ``draft_model``."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    session: Session = Field(repr=False, description="the draft engine, of any backend, loaded")
    tokens: int = Field(default=4, ge=1, le=32, description="drafts a step")


class DraftModel(Decoder):
    """Tokens are distributed as those of the request's sampler on the large engine, and a greedy text is the same. A
    request that draws gets another text than it would without drafts, for it draws other numbers.

    The draft engine's logits go through the request's processors, and its drafts are drawn by the request's sampler: q.
    A draft is accepted with probability ``min(1, p/q)``, in the large engine's distribution p; the first that is not is
    replaced by a draw from what p has more than q. With ``draft_acceptance_threshold`` a draft is accepted where
    ``p/q`` reaches it, which changes the distribution.

    A session has one draft engine. It keeps a cache of its own, with a slot for each of the large engine's.
    """

    Params = DraftModelParams
    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities(
        needs=frozenset({"distribution", "multi_position", "kv_rewind"})
    )

    DRAFT, ACCEPT, DRAW = (draw_salt("draft_model", draw) for draw in range(3))

    def setup(self, context: DecodingContext) -> None:
        """See ``SlotPlugin``, as what follows."""
        self._context = context
        self._runs: DraftRuns | None = None
        self._params: dict[int, DraftModelParams] = {}
        self._most: dict[int, int] = {}
        self._threshold = torch.full((context.slots,), torch.nan, device=context.device)
        self._q: torch.Tensor | None = None
        self._row: dict[int, int] = {}

    def plan(self, view: BranchView) -> BranchPlan:
        return BranchPlan(1, 1, 1 + view.params.tokens)

    def begin(self, slot: int, view: BranchView) -> None:
        params: DraftModelParams = view.params
        if self._runs is None:
            self._runs = DraftRuns(params.session, self._context)
        elif self._runs.session is not params.session:
            raise ConfigError("draft_model: all requests of a session share one draft engine, and this is another one")
        self._most[slot] = min(len(view.prompt) + view.sampling.max_new_tokens, self._context.max_seq_len)
        self._runs.begin(slot, view.prompt, self._most[slot])
        self._params[slot] = params
        threshold = view.sampling.draft_acceptance_threshold
        self._threshold[slot] = torch.nan if threshold is None else threshold

    def end(self, slot: int) -> None:
        if self._params.pop(slot, None) is not None and self._runs is not None:
            self._runs.end(slot)

    def commit(self, batch: CommitBatch) -> None:
        slots = [slot for slot in batch.slot.tolist() if slot in self._params]
        if self._runs is not None and slots:
            lengths = self._context.lengths[torch.tensor(slots, device=batch.slot.device)]
            self._runs.keep(slots, lengths.tolist())

    def propose(self, batch: LogitsBatch) -> Proposal:
        assert self._runs is not None
        slots: list[int] = batch.slot.tolist()
        lengths: list[int] = self._context.lengths[batch.slot].tolist()
        self._runs.keep(slots, lengths)
        # No draft stands where the request may have no token.
        wanted = [
            max(min(self._params[slot].tokens, self._most[slot] - length - 1), 0)
            for slot, length in zip(slots, lengths, strict=True)
        ]
        most, vocab = max(*wanted, 1), self._context.vocab_size_padded
        draft = torch.zeros(self._context.slots, most, dtype=torch.int32, device=batch.slot.device)
        self._q = torch.zeros(len(slots), most, vocab, device=batch.slot.device)
        self._row = {slot: row for row, slot in enumerate(slots)}
        logits = self._runs.catch_up(slots)
        for place in range(most):
            here = LogitsBatch(
                self._context, batch.slot, torch.full_like(batch.slot, place), batch.active, draft if place else None
            )
            q = self.host.distribution(self.host.process(logits, here), here)
            self._q[:, place] = q
            tokens = draw_from(q, batch_uniform(here, self.DRAFT))
            draft[batch.slot, place] = tokens.int()
            going = [row for row, count in enumerate(wanted) if count > place + 1]
            if going:
                rows = torch.tensor(going, device=tokens.device)
                logits[rows] = self._runs.step([slots[row] for row in going], tokens[rows])
        return Proposal(draft[batch.slot].long(), torch.tensor(wanted, device=batch.slot.device))

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection:
        p = self.host.distribution(logits, batch)
        if batch.starts is None:
            taken = possible(logits, draw_from(p, batch_uniform(batch, self.DRAW)))
            return Selection(taken.unsqueeze(1), torch.ones_like(batch.slot))
        assert batch.draft is not None
        rows = batch.slot[batch.starts]
        drafts, counts = batch.draft[rows].long(), positions_of(batch) - 1
        column = torch.arange(drafts.shape[1] + 1, device=rows.device)
        place = (batch.starts.unsqueeze(1) + column).clamp_(max=len(batch.slot) - 1)
        q = self._guessed(rows.tolist(), drafts.shape[1], p)
        threshold = self._threshold[rows].unsqueeze(1)
        least = torch.where(threshold.isnan(), batch_uniform(batch, self.ACCEPT)[place[:, :-1]], threshold)
        tokens, sizes = verified(p[place], q, drafts, counts, least, batch_uniform(batch, self.DRAW)[place])
        # Only the last of them was drawn here.
        end = (sizes - 1).unsqueeze(1)
        last = possible(logits[place.gather(1, end).squeeze(1)], tokens.gather(1, end).squeeze(1))
        return Selection(tokens.scatter(1, end, last.unsqueeze(1)), sizes)

    def _guessed(self, slots: Sequence[int], width: int, p: torch.Tensor) -> torch.Tensor:
        """float32 ``[rows, width, vocab]``: what the drafts of each slot were drawn from. For tokens that a processor
        forced instead it makes no difference: p is theirs alone."""
        q = torch.ones(len(slots), width, p.shape[1], device=p.device)
        if self._q is not None:
            most = min(width, self._q.shape[1])
            for row, slot in enumerate(slots):
                if slot in self._row:
                    q[row, :most] = self._q[self._row[slot], :most]
        return q
