"""For all tests of the core: whether counts are those of draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def chi_square_limit(degrees: int, sigmas: float = 5.0) -> float:
    """A value that chi-square exceeds about as rarely as a normal variable ``sigmas`` (Wilson and Hilferty)."""
    h = 2 / (9 * degrees)
    return float(degrees * (1 - h + sigmas * h**0.5) ** 3)


@pytest.fixture(scope="session")
def assert_distribution() -> Any:
    """``check(counts, probabilities)``: the counts are those of draws with these probabilities."""

    def check(counts: np.ndarray, probabilities: np.ndarray) -> None:
        expected = probabilities / probabilities.sum() * counts.sum()
        assert counts[expected == 0].sum() == 0, "a token was drawn that cannot be"
        common = expected > 5
        rest = counts[~common].sum(), expected[~common].sum()
        chi = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
        chi += (rest[0] - rest[1]) ** 2 / max(rest[1], 1.0)
        assert chi < chi_square_limit(max(1, int(common.sum()))), f"chi-square {chi:.1f}, {common.sum()} bins"

    return check
