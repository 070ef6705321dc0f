"""The detector: counts green tokens. It needs the key, and neither model nor prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtllm_contrib_kgw.green import MAX_CONTEXT, draws_of, keys_of


@dataclass(frozen=True)
class Detection:
    """What a text shows."""

    green: int
    """Tokens that are green."""
    total: int
    """Tokens that were looked at."""
    z: float
    """How many standard deviations there are more green ones than chance would make."""
    p_value: float
    """How often chance makes that many: the upper tail of the normal distribution."""


def detect(
    tokens: Sequence[int], key: int = 15485863, gamma: float = 0.25, context: int = 1, unique: bool = True
) -> Detection:
    """Test a text for the watermark: ``z = (green − γ·T) / √(T·γ·(1 − γ))`` over its T tokens (eq. 3 of the paper).

    Args:
        tokens: the text, without the prompt where that is known.
        key, gamma, context: those of the watermark.
        unique: count each pair of context and token once: repetitions are no evidence of their own.
    """
    places = range(context, len(tokens))
    windows = [(tuple(tokens[at - context : at]), tokens[at]) for at in places]
    windows = list(dict.fromkeys(windows)) if unique else windows
    total = len(windows)
    if not total:
        return Detection(0, 0, 0.0, 0.5)
    table = torch.full((total, MAX_CONTEXT), -1)
    table[:, :context] = torch.tensor([before[::-1] for before, _ in windows])
    keys = keys_of(torch.full((total,), key), table, torch.full((total,), context))
    green = int((draws_of(keys, torch.tensor([token for _, token in windows])) <= gamma).sum())
    z = (green - gamma * total) / math.sqrt(total * gamma * (1 - gamma))
    return Detection(green, total, z, 0.5 * math.erfc(z / math.sqrt(2)))
