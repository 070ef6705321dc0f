"""Log-probabilities of chosen tokens, and the likeliest tokens beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.ranking import largest
from trtllm_core.decoding.samplers import log_probs

Likeliest = dict[int, float]
"""Token to log-probability, the likeliest first."""


def scored(scores: torch.Tensor, tokens: torch.Tensor, samplings: Sequence[SamplingConfig]) -> torch.Tensor:
    """Log-probabilities of the tokens that rows chose, as each row's request wants them counted.

    They are those of the whole vocabulary, or with ``normalize_log_probs`` those among the ``top_k`` largest scores.

    Args:
        scores: float32 ``[n, vocab]``.
        tokens: int64 ``[n, k]``.
        samplings: of the rows.

    Returns:
        float32 ``[n, k]``.
    """
    result = log_probs(scores, tokens)
    among = [sampling.top_k if sampling.normalize_log_probs else 0 for sampling in samplings]
    most = min(max(among, default=0), scores.shape[1])
    if not most:
        return result
    k = torch.tensor(among, device=scores.device).unsqueeze(1)
    values = scores.gather(1, largest(scores, most))
    others = torch.arange(most, device=scores.device) >= k
    total = values.masked_fill(others, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(k > 0, scores.gather(1, tokens.clamp(0, scores.shape[1] - 1)) - total, result)


def likeliest(scores: torch.Tensor, samplings: Sequence[SamplingConfig]) -> list[Likeliest]:
    """For each row of ``scores`` (float32 ``[n, vocab]``) as many of the likeliest tokens as its request wants to see.

    Equally likely ones go by id. Waits for the device.
    """
    counts = [sampling.num_logprobs for sampling in samplings]
    return _listed(scores, counts, log_probs)


def largest_of(chances: torch.Tensor, counts: Sequence[int]) -> list[Likeliest]:
    """Of each row of ``chances`` (log-probabilities, float32 ``[n, vocab]``) the ``counts`` largest, in order.

    Waits for the device.
    """
    return _listed(chances, counts, lambda rows, ids: rows.gather(1, ids))


def _listed(
    scores: torch.Tensor, counts: Sequence[int], log_probs_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[Likeliest]:
    most = min(max(counts, default=0), scores.shape[1])
    if not most:
        return [{} for _ in counts]
    ids = largest(scores, most)
    rows = zip(counts, ids.tolist(), log_probs_of(scores, ids).tolist(), strict=True)
    return [dict(zip(row[:count], chances[:count], strict=True)) for count, row, chances in rows]
