"""The decoder: branches that draw for themselves, and a scorer at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, Field

from trtllm_contrib_best_of.scorers import Scorer, find
from trtllm_core.device import batch_uniform, draw_salt
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import BranchPlan, BranchView, Decoder, Hypothesis, LogitsBatch, Selection

SALT = draw_salt("best_of")


class BestOf(Decoder):
    """Draws ``n`` answers from what the processors leave, and ranks them by a scorer when all are finished."""

    class Params(BaseModel, extra="forbid", frozen=True):
        """What a request says."""

        n: int = Field(default=4, ge=1, le=1024, description="answers to draw")
        scorer: str = Field(default="consensus", description="an installed scorer")

    def __init__(self, scorer: Scorer | None = None) -> None:
        self.scorer = scorer
        """Instead of the one that a request names: for those who register the decoder with a scorer of their own."""
        self.running: dict[str, tuple[Sequence[int], Scorer]] = {}

    def plan(self, view: BranchView) -> BranchPlan:
        """All n branches start at once and share the prompt."""
        returns = view.sampling.num_return_sequences
        if returns > view.params.n:
            raise ConfigError(f"best_of: num_return_sequences={returns}, but n={view.params.n} answers are drawn")
        if self.scorer is None:
            find(view.params.scorer)
        return BranchPlan(branches=view.params.n, max_branches=view.params.n, returns=returns)

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts. Its random numbers are its own, by the number of the branch."""
        self.running[view.request_id] = view.prompt, self.scorer or find(view.params.scorer)

    def select(self, logits: torch.Tensor, batch: LogitsBatch) -> Selection:
        """One token for each row, by the inverse of the running sum of probabilities."""
        sums = logits.softmax(dim=1).cumsum(dim=1)
        share = batch_uniform(batch, SALT).unsqueeze(1) * sums[:, -1:]
        nothing = logits.amax(dim=1, keepdim=True) == -torch.inf  # -1 says that every token is forbidden
        return Selection(torch.where(nothing, -1, torch.searchsorted(sums, share)), torch.ones_like(batch.slot))

    def finalize(self, request_id: str, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """All answers are there: the scorer ranks them; of equals, the branch of the lower number comes first."""
        prompt, scorer = self.running.pop(request_id)
        answers = sorted(hypotheses, key=lambda one: one.branch)
        scores = list(scorer(prompt, answers))
        if len(scores) != len(answers):
            raise ValueError(f"the scorer gave {len(scores)} scores for {len(answers)} answers")
        scored = [replace(one, score=float(score)) for one, score in zip(answers, scores, strict=True)]
        return sorted(scored, key=lambda one: -one.score)
