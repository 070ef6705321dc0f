"""Largest logits and the token at which their probabilities add up to a share, against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_core.decoding import ranking
from trtllm_core.decoding.ranking import crossing, largest, masses, part, reaches


@pytest.mark.parametrize(("vocab", "k"), [(1000, 1), (1000, 7), (257, 4), (64, 16), (64, 63), (5, 5), (4096, 300)])
def test_largest_is_a_stable_sort(vocab, k, rng):
    for spread in (0.0, 0.7, 50.0):  # all equal, many equal, few equal
        x = torch.from_numpy(np.round(rng.normal(0, spread, (9, vocab))).astype(np.float32))
        x[rng.random(x.shape) < 0.1] = -torch.inf
        x[rng.random(x.shape) < 0.1] = -0.0
        assert torch.equal(largest(x, k), x.sort(dim=1, descending=True, stable=True).indices[:, :k])


def by_sorting(values, weights, target):
    ids = values.sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, reaches(weights.gather(1, ids).cumsum(1), target))


@pytest.fixture(params=["host", "device"])
def road(request, monkeypatch):
    if request.param == "device":
        monkeypatch.setattr(ranking, "_on_host", lambda tensor: False)


@pytest.mark.parametrize("vocab", [1, 7, 1000, 5000, 40_000])
@pytest.mark.parametrize("spread", [0.0, 0.7, 4.0, 1e30])
def test_crossing_is_a_walk_over_a_stable_sort(vocab, spread, road, rng):
    x = rng.normal(0, spread, (12, vocab)).astype(np.float32)
    x[:4] = np.round(x[:4])  # many equal
    x[rng.random(x.shape) < 0.1] = -np.inf
    x[rng.random(x.shape) < 0.1] = -0.0
    x[:, 0] = 0.5
    values = torch.from_numpy(x)
    weights = masses(values)
    total = weights.sum(1, keepdim=True)
    for share in (1e-9, 0.01, 0.5, 0.9, 0.999, 1.0):
        target = part(torch.full((12, 1), share), total)
        assert torch.equal(crossing(values, weights, target), by_sorting(values, weights, target))


@pytest.mark.parametrize("vocab", [1, 40, 3000])
def test_radix_search_on_its_own(vocab, rng):
    values = torch.from_numpy(np.round(rng.normal(0, 3, (20, vocab)), 1).astype(np.float32))
    weights = torch.from_numpy(rng.integers(0, 9, (20, vocab)))
    weights[:, 0] += 1
    target = (weights.sum(1, keepdim=True) * torch.rand(20, 1)).long().clamp(min=1)
    assert torch.equal(ranking._radix(values, weights, target), by_sorting(values, weights, target))


def test_crossing_takes_any_weights(road, rng):
    """Of typical sampling, the values say how near a token is, and the weights how likely."""
    values = torch.from_numpy(rng.normal(0, 2, (30, 6000)).astype(np.float32))
    weights = torch.from_numpy(rng.integers(0, 5, (30, 6000)))
    target = torch.from_numpy(rng.integers(1, 11000, (30, 1)))
    assert torch.equal(crossing(values, weights, target), by_sorting(values, weights, target))


def test_masses_add_up_alike_in_any_order(rng):
    weights = masses(torch.from_numpy(rng.normal(0, 9, (3, 50_000)).astype(np.float32)))
    shuffled = weights[:, torch.from_numpy(rng.permutation(50_000))]
    assert torch.equal(weights.cumsum(1)[:, -1], shuffled.cumsum(1)[:, -1])
    assert weights.amax(1).tolist() == [2**32] * 3
