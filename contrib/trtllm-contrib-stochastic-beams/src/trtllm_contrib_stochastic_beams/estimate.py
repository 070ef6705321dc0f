"""Expectations from samples without replacement."""

from __future__ import annotations

import math
from collections.abc import Sequence


def weights(log_probs: Sequence[float], scores: Sequence[float]) -> list[float]:
    """Importance weights of all sequences but the last, whose score is the threshold (eq. 12 of the paper).

    ``sum(w * f(sequence))`` over them is an unbiased estimate of the mean of ``f`` over the model's sequences.

    Args:
        log_probs: ``cum_log_prob`` of each of the k sequences, best score first.
        scores: their ``score``.
    """
    threshold = scores[-1]
    return [math.exp(phi) / -math.expm1(-math.exp(phi - threshold)) for phi in log_probs[:-1]]
