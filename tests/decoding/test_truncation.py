"""Truncating processors against those of transformers on random logits, row by row in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from trtllm_core.decoding import ranking, truncation

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
