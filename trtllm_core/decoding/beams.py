"""What all beam searches share: scores by slot, the best continuations of many requests at once, and their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from trtllm_core.decoding.ranking import largest
from trtllm_core.decoding.state import copy_slots
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.decoder import BranchPlan, Candidates, Decoder, DecoderCapabilities, Survivors

if TYPE_CHECKING:
    from trtllm_core.config import SamplingConfig
    from trtllm_core.plugin.stopping import Stop
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext, LogitsBatch

IMPOSSIBLE = -1e30
"""Scores below it belong to tokens that a processor forbade."""


@dataclass(slots=True)
class Search:
    """The search of one request."""

    request_id: str
    sampling: SamplingConfig
    end_ids: tuple[int, ...]
    most: int
    """Tokens that a sequence can have."""
    widths: tuple[int, ...]
    """Beams after each step; the last counts for all that follow."""
    slots: list[int] = field(default_factory=list)
    """By beam."""
    length: int = 0
    """Generated tokens of each beam."""
    finished: list[float] = field(default_factory=list)
    """What the best finished sequences are ranked by, best first; no more than there are beams."""

    @property
    def width(self) -> int:
        """Beams after the coming step."""
        return self.widths[min(self.length, len(self.widths) - 1)]

    def finish(self, scores: Iterable[float]) -> None:
        """Sequences are complete: the best of all that are stay."""
        self.finished = sorted([*self.finished, *scores], reverse=True)[: max(self.widths)]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one request in a step. Numbers are places among its candidates, best first."""

    going: Sequence[tuple[int, int]] = ()
    """(beam, number): the beams of the next step."""
    finished: Sequence[tuple[int, float]] = ()


class Beams(Decoder):
    """A beam search. Beam i is branch i, so the best is always the request's first sequence.

    Subclasses say how many continuations are weighed (``weigh``), how good they are (``values``), and which of them go
    on (``decide``). Equal scores go to the earlier beam and the lower token.
    """

    capabilities: ClassVar[DecoderCapabilities] = DecoderCapabilities(needs=frozenset({"kv_fork"}))

    _scores: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        """See ``SlotPlugin``, as what follows."""
        self._max_seq_len = context.max_seq_len
        self._scores = torch.zeros(context.slots, device=context.device)
        self._searches: dict[str, Search] = {}
        self._of: dict[int, tuple[Search, int]] = {}
        self._placed: tuple[list[int], torch.Tensor] | None = None
        self._decided: list[tuple[Search, list[float]]] = []

    def plan(self, view: BranchView) -> BranchPlan:
        most = max(self.widths(view))
        return BranchPlan(branches=1, max_branches=most, returns=self.returns(view, most))

    def begin(self, slot: int, view: BranchView) -> None:
        search = self._searches.get(view.request_id)
        if search is None:
            most = min(view.sampling.max_new_tokens, self._max_seq_len - len(view.prompt))
            search = Search(view.request_id, view.sampling, view.end_ids, most, self.widths(view))
            self._searches[view.request_id] = search
        self._of[slot] = search, view.branch
        search.slots.append(slot)
        self._scores[slot] = 0.0

    def end(self, slot: int) -> None:
        search, _ = self._of.pop(slot)
        self._searches.pop(search.request_id, None)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._scores)

    def commit(self, batch: CommitBatch) -> None:
        if self._placed is not None:
            slots, scores = self._placed
            self._scores[slots] = scores
            self._placed = None
        for search, finished in self._decided:
            search.length += 1
            search.finish(finished)
        self._decided = []

    # -- what searches differ in -----------------------------------------------------------------------------------

    def widths(self, view: BranchView) -> tuple[int, ...]:
        """Beams after each step of a request.

        Raises:
            ConfigError: the request asks for what this search does not do.
        """
        return (view.sampling.num_beams,)

    def returns(self, view: BranchView, most: int) -> int:
        """How many sequences the user gets."""
        count = view.sampling.num_return_sequences
        if count > most:
            raise ConfigError(f"num_return_sequences={count}: a search with {most} beams returns at most {most}")
        return count

    def weigh(self, search: Search) -> int:
        """How many continuations of a request are weighed in a step."""
        return 2 * search.width

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        """What each token adds to the score of its beam, float32 ``[n, vocab_size_padded]``; may overwrite."""
        return logits.log_softmax(dim=1)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        return self.values(logits.clone())

    def bonus(self, search: Search) -> float:
        """What is added to a score, times the number of its beam."""
        return 0.0

    def noise(self, values: torch.Tensor, batch: LogitsBatch, at: torch.Tensor) -> torch.Tensor | None:
        """What is added to ``values`` while continuations are weighed, and not to their scores; None: nothing.

        ``at``, int64 ``[n]``, are the rows of the batch that ``values`` are of.
        """
        return None

    def decide(self, search: Search, scores: Sequence[float], stops: Sequence[Stop | None]) -> Decision:
        """What goes on. ``scores`` and ``stops`` are of the request's candidates, best first. Changes nothing."""
        raise NotImplementedError

    # -- a step ----------------------------------------------------------------------------------------------------

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Candidates:
        """The best continuations of each request: the best of each beam first, and then of all its beams."""
        at = batch.active.nonzero().squeeze(1)
        beams = [self._of[slot] for slot in batch.slot[at].tolist()]
        rows: dict[str, list[int]] = {}
        for i in sorted(range(len(beams)), key=lambda i: beams[i][1]):
            rows.setdefault(beams[i][0].request_id, []).append(i)
        searches = [self._searches[name] for name in rows]
        weighed = [self.weigh(search) for search in searches]
        widest = max(map(len, rows.values()))
        values = self.values(logits if len(at) == len(logits) else logits[at])
        place = torch.tensor([mine + [-1] * (widest - len(mine)) for mine in rows.values()], device=logits.device)
        extra = torch.tensor([self.bonus(search) * beam for search, beam in beams], device=logits.device)
        scores = self._scores[batch.slot[at]] + extra
        limit = torch.tensor(weighed, device=logits.device)
        found = best_of(values, scores, place, limit, max(weighed), self.noise(values, batch, at))
        row, tokens, totals, gains, kept = found
        return Candidates(batch.slot[at][row[kept]], tokens[kept], totals[kept], gains[kept])

    def survive(self, candidates: Candidates, stops: Sequence[Stop | None]) -> Survivors:
        """See ``Decoder``."""
        branches: list[tuple[int, int, float]] = []
        finished: list[tuple[int, float]] = []
        self._decided = []
        scores = candidates.scores.tolist()
        for search, mine in self._by_request(candidates.slot.tolist()):
            decision = self.decide(search, [scores[i] for i in mine], [stops[i] for i in mine])
            branches += [
                (search.slots[beam], mine[number], self.rank(search, scores[mine[number]], search.length + 1))
                for beam, number in decision.going
            ]
            finished += [(mine[number], score) for number, score in decision.finished]
            self._decided.append((search, [score for _, score in decision.finished]))
        indices = torch.tensor([index for _, index, _ in branches], dtype=torch.int64, device=candidates.slot.device)
        self._placed = [slot for slot, _, _ in branches], candidates.scores[indices]
        return Survivors(branches, finished)

    def rank(self, search: Search, score: float, length: int) -> float:
        """A sequence's score for ranking: per token to the power of the length penalty."""
        penalty = search.sampling.length_penalty
        return score if penalty == 0 or length == 1 else score / length**penalty

    def _by_request(self, slots: Sequence[int]) -> Iterator[tuple[Search, list[int]]]:
        mine: dict[str, list[int]] = {}
        for index, slot in enumerate(slots):
            mine.setdefault(self._of[slot][0].request_id, []).append(index)
        for request_id, indices in mine.items():
            yield self._searches[request_id], indices


def best_of(
    values: torch.Tensor,
    scores: torch.Tensor,
    place: torch.Tensor,
    limit: torch.Tensor,
    most: int,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best continuations of each of r requests: the best of each of its beams first, and of those the best.

    Args:
        values: float32 ``[n, vocab]``: what a token adds to the score of beam n.
        scores: float32 ``[n]``: of the beams.
        place: int64 ``[r, beams]``: which rows of ``values`` are a request's, in order; -1 where it has fewer.
        limit: int64 ``[r]``: how many continuations of a request are wanted.
        most: the largest of them.
        noise: float32 ``[n, vocab]``, added to choose and not counted; the chosen are then ordered without it.

    Returns:
        For each request its continuations, best first, all ``[r, m]``: row of ``values``, token, score, value, and
        whether it is one (bool): there may be fewer.
    """
    top = min(most, values.shape[1])
    ids = largest(values if noise is None else values + noise, top)
    gains = values.gather(1, ids)
    totals = gains + scores.unsqueeze(1)
    ranks = totals if noise is None else totals + noise.gather(1, ids)
    column = torch.arange(most, device=values.device)
    missing = (place < 0).unsqueeze(2) | (column[:top] >= limit.view(-1, 1, 1))
    # [r, beams · top]: a request's beams side by side.
    table = ranks[place.clamp(min=0)].masked_fill_(missing, -torch.inf).flatten(1)
    order = table.sort(dim=1, descending=True, stable=True).indices[:, :most]
    row, rank = place.gather(1, order // top).clamp_(min=0), order % top
    total = totals[row, rank].masked_fill_(missing.flatten(1).gather(1, order), -torch.inf)
    total.masked_fill_(column[: total.shape[1]] >= limit.unsqueeze(1), -torch.inf)
    if noise is not None:
        total, again = total.sort(dim=1, descending=True, stable=True)
        row, rank = row.gather(1, again), rank.gather(1, again)
    return row, ids[row, rank], total, gains[row, rank], total > IMPOSSIBLE
