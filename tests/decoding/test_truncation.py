"""Truncating processors against those of transformers on random logits, row by row in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from trtllm_core.decoding import ranking, truncation
from trtllm_core.decoding.samplers import Multinomial

WARPERS = {
    "top_k": (truncation.TopK, hf.TopKLogitsWarper, (0, 1, 2, 7, 40, 60), 0),
    "top_p": (truncation.TopP, hf.TopPLogitsWarper, (0.01, 0.3, 0.5, 0.9, 0.99, 1.0), 1.0),
    "min_p": (truncation.MinP, hf.MinPLogitsWarper, (0.0, 0.02, 0.1, 0.4, 0.9, 1.0), 0.0),
    "typical_p": (truncation.TypicalP, hf.TypicalLogitsWarper, (0.05, 0.2, 0.5, 0.9, 0.99, 1.0), 1.0),
    "epsilon_cutoff": (truncation.EpsilonCutoff, hf.EpsilonLogitsWarper, (0.0, 1e-4, 1e-3, 0.01, 0.1, 0.9), 0.0),
    "eta_cutoff": (truncation.EtaCutoff, hf.EtaLogitsWarper, (0.0, 1e-4, 1e-3, 0.01, 0.1, 0.9), 0.0),
}


@pytest.fixture(params=list(WARPERS))
def warper(request):
    return request.param, *WARPERS[request.param]


@pytest.fixture(params=["host", "device"])
def road(request, monkeypatch):
    if request.param == "device":
        monkeypatch.setattr(ranking, "_on_host", lambda tensor: False)


def begun(new_floor, warper, **sizes):
    field, make, _, values, _ = warper
    floor, plugin = new_floor(**sizes), make()
    plugin.setup(floor.context)
    for slot, value in enumerate(values):
        plugin.begin(slot, floor.view(slot, [1], **{field: value}))
    return floor, plugin


def test_as_transformers_does(warper, road, new_floor, rng):
    _, _, theirs, values, off = warper
    floor, plugin = begun(new_floor, warper, vocab=60, padded=64)
    for spread in (0.3, 1.0, 4.0) * 4:
        x = torch.from_numpy(rng.normal(0, spread, (6, 64)).astype(np.float32))
        x[rng.random(x.shape) < 0.2] = -torch.inf
        x[:, 60:] = torch.finfo(torch.float32).min
        slots = rng.permutation(6).tolist()
        active = (rng.random(6) < 0.8).tolist()
        got = x.clone()
        plugin.apply(got, floor.logits_batch(slots, active))
        for row, slot, on, mine in zip(x, slots, active, got, strict=True):
            value = values[slot]
            alone = row[None]
            want = theirs(value)(None, alone.clone()) if on and value != off else alone
            assert torch.equal(mine, want[0]), (value, mine, want)


def test_the_likeliest_always_stays(warper, new_floor):
    """Typical sampling apart, which may drop it."""
    floor, plugin = begun(new_floor, warper)
    logits = torch.full((6, 44), -5.0)
    logits[:, 3] = 9.0
    plugin.apply(logits, floor.logits_batch(range(6)))
    assert logits[:, 3].tolist() == [9.0] * 6


def test_equals_at_the_border(new_floor):
    """Of equals, top-k keeps all and top-p those with the lowest ids that it needs."""
    x = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    floor, plugin = begun(new_floor, ("top_k", *WARPERS["top_k"]), vocab=4, padded=4)
    logits = x.clone()
    plugin.apply(logits, floor.logits_batch([2]))
    assert logits[0].isfinite().tolist() == [False, True, True, True]
    floor, plugin = begun(new_floor, ("top_p", *WARPERS["top_p"]), vocab=4, padded=4)
    logits = x.clone()
    plugin.apply(logits, floor.logits_batch([2]))  # 0.5 is reached by two of three
    assert logits[0].isfinite().tolist() == [False, True, True, False]


@pytest.mark.parametrize("cycle", [(1, 0), (1, 2, 0)])
def test_fork_is_simultaneous(warper, new_floor, rng, cycle):
    floor, plugin = begun(new_floor, warper)
    n = len(cycle)
    raw = torch.from_numpy(rng.normal(0, 1, (1, 44)).astype(np.float32)).expand(n, -1)
    before, after = raw.clone(), raw.clone()
    plugin.apply(before, floor.logits_batch(list(cycle)))
    plugin.fork(torch.tensor(cycle), torch.arange(n))
    plugin.apply(after, floor.logits_batch(list(range(n))))
    assert torch.equal(before, after)


EXACT = {
    "top_k": (6, lambda p: p >= np.sort(p)[-6]),
    "top_p": (0.6, lambda p: np.argsort(np.argsort(-p)) <= np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.6)),
    "min_p": (0.3, lambda p: p >= 0.3 * p.max()),
    "epsilon_cutoff": (0.05, lambda p: p >= 0.05),
    "eta_cutoff": (0.2, lambda p: p >= min(0.2, 0.2**0.5 * np.exp((p * np.log(p)).sum()))),
}


def typical(p, mass=0.5):
    surprise = -np.log(p)
    order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
    kept = np.zeros(len(p), bool)
    kept[order[: np.searchsorted(np.cumsum(p[order]), mass) + 1]] = True
    return kept


@pytest.mark.parametrize("field", [*EXACT, "typical_p"])
def test_tokens_that_are_drawn_have_the_distribution_that_is_left(field, new_floor, assert_distribution, rng):
    """Each truncation with the sampler behind it, over many draws in one call."""
    draws, x = 40_000, rng.normal(0, 1.2, 30).astype(np.float32)
    value, kept = EXACT.get(field, (0.5, typical))
    floor, plugin, sampler = new_floor(vocab=30, padded=30), WARPERS[field][0](), Multinomial()
    plugin.setup(floor.context)
    sampler.setup(floor.context)
    plugin.begin(0, floor.view(0, [1], **{field: value}))
    batch = floor.logits_batch([0] * draws, offsets=range(draws))
    logits = torch.from_numpy(x).repeat(draws, 1)
    plugin.apply(logits, batch)
    p = np.exp(x.astype(np.float64))
    p /= p.sum()
    expected = np.where(kept(p), p, 0)
    assert 1 < (expected > 0).sum() < 30
    assert_distribution(np.bincount(sampler.sample(logits, batch).numpy(), minlength=30), expected)
