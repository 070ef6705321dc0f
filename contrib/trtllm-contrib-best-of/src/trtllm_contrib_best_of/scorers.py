"""What a scorer is, where scorers are found, and one that needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from trtllm_core.errors import ConfigError
from trtllm_core.plugin import Hypothesis

Scorer = Callable[[Sequence[int], Sequence[Hypothesis]], Sequence[float]]
"""Prompt and finished answers in, one score for each out; higher is better. It is called once a request."""

GROUP = "trtllm_contrib_best_of"
"""Packages offer scorers as entry points of this group."""


def find(name: str) -> Scorer:
    """The installed scorer of a name.

    Raises:
        ConfigError: there is none.
    """
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise ConfigError(f"best_of: no scorer {name!r} is installed (installed: {', '.join(sorted(known))})")
    scorer: Scorer = known[name].load()
    return scorer


def consensus(prompt: Sequence[int], answers: Sequence[Hypothesis]) -> list[float]:
    """How many of the answers say the same: their text where there is one, else their tokens."""
    said = [answer.text.strip() or tuple(answer.tokens[: answer.length]) for answer in answers]
    votes = Counter(said)
    return [float(votes[each]) for each in said]
