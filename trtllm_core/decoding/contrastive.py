"""Contrastive search (Su and others 2022): likely tokens that are unlike the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from trtllm_core.config import Config
from trtllm_core.decoding.ranking import largest
from trtllm_core.plugin.decoder import NO_TOKEN, BranchPlan, Decoder, DecoderCapabilities, Selection
from trtllm_core.plugin.lifecycle import Example

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch


class ContrastiveParams(Config):
    """Parameters of ``contrastive_search``."""

    top_k: int = Field(default=4, ge=2, le=64, description="tokens that are looked at")
    penalty_alpha: float = Field(default=0.6, ge=0.0, le=1.0, description="what being like the text so far weighs")


@dataclass(slots=True)
class Text:
    """What is kept of one branch."""

    params: ContrastiveParams
    request_id: str
    most: int
    """Tokens that it can have."""
    states: torch.Tensor | None = None
    """float32 ``[most, hidden_size]``: final hidden states of its tokens, each of length 1."""
    known: int = 0
    """Of how many tokens they are there."""
    seen: tuple[Sequence[int], torch.Tensor] = ((), torch.empty(0))
    """The candidates of the last step and their states: one of them is the next token."""


class ContrastiveSearch(Decoder):
    """Of the ``top_k`` likeliest tokens v, the one with the largest ``(1 − α)·p(v) − α·max_j cos(h_v, h_j)``.

    p is the distribution after the processors, h_v the final hidden state that the model gives v behind the text, and
    h_j those of all tokens of the text, prompt included. Equal ones go by their probability, then by id. A token that a
    processor forbids is not chosen.

    A request has ``top_k`` slots beside its own, in which the candidates run: one call of the engine more for each
    token. States of the prompt are computed once, behind its first run.
    """

    Params = ContrastiveParams
    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities(needs=frozenset({"hidden_states", "kv_fork"}))
    examples: ClassVar[Sequence[Example]] = (Example({"top_k": 3}), Example({"top_k": 2, "penalty_alpha": 0.9}))

    def setup(self, context: DecodingContext) -> None:
        """See ``SlotPlugin``, as what follows."""
        self._context = context
        self._texts: dict[int, Text] = {}
        self._resting: dict[str, list[int]] = {}
        self._owner: dict[int, str] = {}

    def plan(self, view: BranchView) -> BranchPlan:
        return BranchPlan(1, 1 + view.params.top_k)

    def begin(self, slot: int, view: BranchView) -> None:
        if view.branch == 0:
            most = min(len(view.prompt) + view.sampling.max_new_tokens, self._context.max_seq_len)
            self._texts[slot] = Text(view.params, view.request_id, most)
        else:
            self._resting.setdefault(view.request_id, []).append(slot)
        self._owner[slot] = view.request_id

    def end(self, slot: int) -> None:
        self._texts.pop(slot, None)
        self._resting.pop(self._owner.pop(slot, ""), None)

    def rewind(self, slot: int, n: int) -> None:
        if slot in self._texts:
            self._texts[slot].known = min(self._texts[slot].known, int(self._context.lengths[slot]))

    def commit(self, batch: CommitBatch) -> None:
        rows = zip(batch.slot.tolist(), batch.tokens[:, 0].tolist(), batch.counts.tolist(), strict=True)
        for slot, token, count in rows:
            text = self._texts.get(slot)
            if text is None or count != 1 or text.states is None or token not in text.seen[0]:
                continue  # what is missing is computed before the next choice
            if text.known < text.most:
                text.states[text.known] = text.seen[1][text.seen[0].index(token)]
                text.known += 1

    def looks(self, slots: Sequence[int]) -> dict[int, int]:
        resting = ((slot, self._resting[self._texts[slot].request_id]) for slot in slots)
        return {each: int(self._context.lengths[slot]) + 1 for slot, several in resting for each in several}

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection:
        rows, slots = batch.active.nonzero().flatten().tolist(), batch.slot.tolist()
        tokens = torch.zeros_like(batch.slot)
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = self._chosen([slots[row] for row in rows], logits[index])
        return Selection(tokens.unsqueeze(1), torch.ones_like(batch.slot))

    def _chosen(self, slots: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """int64 ``[n]``: the next token of each slot, from its row of ``logits``."""
        texts = [self._texts[slot] for slot in slots]
        for slot, text in zip(slots, texts, strict=True):
            self._catch_up(slot, text)
        counts = [min(text.params.top_k, logits.shape[1]) for text in texts]
        ids = largest(logits, max(counts))
        candidates = [row[:k] for row, k in zip(ids.tolist(), counts, strict=True)]
        source = [slot for slot, k in zip(slots, counts, strict=True) for _ in range(k)]
        resting = [slot for text, k in zip(texts, counts, strict=True) for slot in self._resting[text.request_id][:k]]
        found = self.host.look(source, resting, [[token] for row in candidates for token in row])
        states = torch.nn.functional.normalize(found, dim=1)
        there = logits.gather(1, ids)
        chances = (there - logits.logsumexp(dim=1, keepdim=True)).exp()
        # Columns of a padded vocabulary have the least of all numbers; a processor forbids by minus infinity.
        allowed = there > torch.finfo(torch.float32).min
        picks, start = [], 0
        for row, (text, k) in enumerate(zip(texts, counts, strict=True)):
            assert text.states is not None
            own = states[start : start + k]
            alike = (own @ text.states[: text.known].T).amax(dim=1)
            alpha = text.params.penalty_alpha
            score = torch.where(allowed[row, :k], (1 - alpha) * chances[row, :k] - alpha * alike, -torch.inf)
            picks.append(score.argmax())
            text.seen = candidates[row], own
            start += k
        pick = torch.stack(picks).unsqueeze(1)
        return torch.where(allowed.gather(1, pick), ids.gather(1, pick), NO_TOKEN).squeeze(1)

    def _catch_up(self, slot: int, text: Text) -> None:
        """States of all of a text, where some are missing: of a prompt, and of tokens that were put there."""
        length = int(self._context.lengths[slot])
        if text.known == length:
            return
        whole = self._context.tokens[slot, :length].tolist()
        found = torch.nn.functional.normalize(
            self.host.look([None], self._resting[text.request_id][:1], [whole]), dim=1
        )
        if text.states is None:
            text.states = found.new_zeros(text.most, found.shape[1])
        text.states[:length] = found
        text.known = length
