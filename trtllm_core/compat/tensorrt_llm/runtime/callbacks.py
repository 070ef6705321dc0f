"""The classic callbacks: base classes to subclass, and lists of them."""

from __future__ import annotations

import torch


class LogitsProcessor:
    """Changes the scores of a step, before anything else does."""

    def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """int32 ``[batch * beams, length]`` and float32 ``[batch * beams, vocab_size_padded]``; returns the scores."""
        raise NotImplementedError


class LogitsProcessorList(list[LogitsProcessor], LogitsProcessor):
    """Runs its members one after another."""

    def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for processor in self:
            scores = processor(step, input_ids, scores)
        return scores


class StoppingCriteria:
    """Says after each step whether the whole batch is over."""

    def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> bool:
        """As ``LogitsProcessor``; the step's tokens are among ``input_ids``."""
        raise NotImplementedError


class StoppingCriteriaList(list[StoppingCriteria], StoppingCriteria):
    """Over as soon as one of its members says so; those after it are not asked then."""

    def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> bool:
        return any(criterion(step, input_ids, scores) for criterion in self)
