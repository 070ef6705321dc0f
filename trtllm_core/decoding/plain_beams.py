"""Classic beam search where no finished sequence is kept aside: ``use_beam_hyps=False``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from trtllm_core.decoding.beam_search import BeamSearch
from trtllm_core.decoding.beams import Decision, Search
from trtllm_core.plugin.lifecycle import Example

if TYPE_CHECKING:
    from trtllm_core.plugin.decoder import Candidates, Hypothesis, Survivors
    from trtllm_core.plugin.stopping import Stop
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext

Kept = dict[int, tuple[float, int]]
"""Place to the finished sequence in it: its score, and which of the request's finished sequences it is."""


class PlainBeamSearch(BeamSearch):
    """Beam search for K beams (``num_beams``, or step by step ``beam_width_array``), in K places.

    Of each running beam the K likeliest tokens are candidates, with the beam's score plus their log-probability plus
    ``beam_search_diversity_rate`` times the number of the beam. The K best of them and of the finished sequences take
    the places, best first: a finished sequence keeps its score and runs no more, until better ones push it out, and
    then it is lost. The request is over when all places hold finished sequences, or at ``max_new_tokens``. It returns
    what is in the places, in their order: by ``cum_log_prob``, which no length penalty divides.
    """

    examples: ClassVar[Sequence[Example]] = (Example(sampling={"num_beams": 3, "use_beam_hyps": False}),)

    def setup(self, context: DecodingContext) -> None:
        """See ``SlotPlugin``, as what follows."""
        super().setup(context)
        self._kept: dict[str, Kept] = {}
        self._ended: dict[str, int] = {}
        self._moving: list[tuple[str, Kept, int]] = []

    def begin(self, slot: int, view: BranchView) -> None:
        super().begin(slot, view)
        self._kept.setdefault(view.request_id, {})
        self._ended.setdefault(view.request_id, 0)

    def end(self, slot: int) -> None:
        name = self._of[slot][0].request_id
        super().end(slot)
        self._kept.pop(name, None)
        self._ended.pop(name, None)
        self._moving = [one for one in self._moving if one[0] != name]

    def commit(self, batch: CommitBatch) -> None:
        super().commit(batch)
        for name, kept, ended in self._moving:
            self._kept[name], self._ended[name] = kept, self._ended[name] + ended
        self._moving = []

    def weigh(self, search: Search) -> int:
        return search.width

    def rank(self, search: Search, score: float, length: int) -> float:
        return score

    def survive(self, candidates: Candidates, stops: Sequence[Stop | None]) -> Survivors:
        self._moving = []
        return super().survive(candidates, stops)

    def decide(self, search: Search, scores: Sequence[float], stops: Sequence[Stop | None]) -> Decision:
        before, number = self._kept[search.request_id], self._ended[search.request_id]
        # Of equal ones those that are finished come first.
        old = [(-score, 0, which) for score, which in before.values()]
        best = sorted([*old, *((-score, 1, index) for index, score in enumerate(scores))])[: search.width]
        kept: Kept = {}
        going: list[tuple[int, int]] = []
        finished: list[tuple[int, float]] = []
        for place, (negative, new, index) in enumerate(best):
            if not new:
                kept[place] = -negative, index
            elif stops[index] is None:
                going.append((place, index))
            else:
                kept[place] = -negative, number + len(finished)
                finished.append((index, -negative))
        self._moving.append((search.request_id, kept, len(finished)))
        return Decision(going, finished)

    def finalize(self, request_id: str, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """What is in the places; ``hypotheses`` come in the order in which they finished."""
        # A step after which no branch goes on is not committed.
        moving = (kept for name, kept, _ in self._moving if name == request_id)
        places = next(moving, self._kept[request_id])
        return [hypotheses[which] for _, (_, which) in sorted(places.items())]
