"""Samplers against the plain reference, and against the distributions that they must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_core.decoding import samplers
from trtllm_core.decoding.random import batch_uniform, slot_key
from trtllm_core.decoding.samplers import Greedy, Multinomial, TopKTopP, log_probs

CHOICES = [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.5), (0, 0.5), (0, 0.9), (4, 1.0), (0, 1.0), (40, 0.95), (5, 0.0)]


def begun(new_floor, choices, **sizes):
    floor = new_floor(slots=max(6, len(choices)), **sizes)
    sampler = TopKTopP()
    sampler.setup(floor.context)
    for slot, (k, p) in enumerate(choices):
        sampler.begin(slot, floor.view(slot, [1] * (slot + 1), top_k=k, top_p=p))
    return floor, sampler


@pytest.mark.parametrize(
    ("u", "tokens"),
    [(1e-7, "0000000"), (0.5, "0000011"), (0.8, "0010022"), (0.99, "0011123"), (1.0, "0011123")],
)
def test_golden_walk(u, tokens, new_floor, monkeypatch):
    """Appendix A: p = (.4, .3, .2, .1) and all combinations in one batch."""
    floor, sampler = begun(new_floor, CHOICES[:7], vocab=4, padded=4)
    monkeypatch.setattr(samplers, "batch_uniform", lambda batch, salt: torch.full((7,), u))
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(7, 1)
    assert sampler.sample(logits, floor.logits_batch(range(7))).tolist() == [int(token) for token in tokens]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("choices", [CHOICES, [c for c in CHOICES if c[0]], [c for c in CHOICES if c != (0, 0.5)]])
def test_rows_with_different_choices_against_the_reference(new_floor, reference, rng, choices, ties):
    floor, sampler = begun(new_floor, choices, vocab=60, padded=64)
    for _ in range(40):
        rows = rng.permutation(len(choices)).tolist()
        x = rng.normal(0, 2, (len(rows), 64)).astype(np.float32)
        x = np.round(x) if ties else x
        x[:, 60:] = reference.NEG
        x[rng.random(x.shape) < 0.2] = -np.inf
        x[:, 7] = 0.0  # something is always left
        logits, batch = torch.from_numpy(x.copy()), floor.logits_batch(rows)
        got = sampler.sample(logits, batch).tolist()
        assert np.array_equal(logits.numpy(), x), "other decoders' rows are in there too"
        u = batch_uniform(batch, TopKTopP.SALT).tolist()
        for row, slot in enumerate(rows):
            if choices[slot] == (0, 1.0):
                assert x[row, got[row]] > reference.NEG
            else:
                assert got[row] == reference.sample(x[row], u[row], *choices[slot])


def test_a_row_does_not_depend_on_the_others(new_floor, rng):
    """Alone, beside a row that needs a sort, beside a plain one: the same token."""
    for choice in CHOICES:
        alone = None
        for others in ([], [(0, 0.5)], [(0, 1.0)], [(50, 0.9)], [(0, 0.3), (0, 1.0)]):
            floor, sampler = begun(new_floor, [choice, *others], vocab=500, padded=512)
            x = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (20, 512)).astype(np.float32)).bfloat16().float()
            tokens = []
            for row in x:
                floor.append(0, [1])
                batch = floor.logits_batch(range(1 + len(others)))
                tokens.append(int(sampler.sample(row.repeat(1 + len(others), 1), batch)[0]))
            alone = alone or tokens
            assert tokens == alone


@pytest.mark.parametrize("choice", [(0, 0.5), (3, 0.5), (0, 1.0), (0, 0.9), (8, 0.0), (5, 0.8)])
def test_distribution(choice, new_floor, reference, assert_distribution, rng):
    draws = 40_000
    x = rng.normal(0, 1.5, 24).astype(np.float32)
    if choice[0] != 0 or choice[1] == 0.5:
        x[:4] = np.log([0.4, 0.3, 0.2, 0.1])
        x[4:] = -np.inf
    floor, sampler = begun(new_floor, [choice], vocab=24, padded=24)
    floor.context.seeds[0] = slot_key(11, 0)
    counts = np.zeros(24, int)
    offsets = np.arange(draws)  # as if it were one long draft: other positions, other numbers
    for part in np.split(offsets, 10):
        batch = floor.logits_batch([0] * len(part), offsets=part.tolist())
        tokens = sampler.sample(torch.from_numpy(x).repeat(len(part), 1), batch)
        counts += np.bincount(tokens.numpy(), minlength=24)
    assert_distribution(counts, reference.distribution(x, *choice))


def test_multinomial_draws_from_what_is_left(new_floor, assert_distribution, rng):
    draws, x = 40_000, rng.normal(0, 1.5, 24).astype(np.float32)
    x[5:9] = -np.inf
    floor, sampler = new_floor(vocab=24, padded=24), Multinomial()
    sampler.setup(floor.context)
    sampler.begin(0, floor.view(0, [1]))
    batch = floor.logits_batch([0] * draws, offsets=range(draws))
    counts = np.bincount(sampler.sample(torch.from_numpy(x).repeat(draws, 1), batch).numpy(), minlength=24)
    assert_distribution(counts, np.exp(x.astype(np.float64)))


def test_border_token_gets_only_its_part(reference):
    p = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert reference.distribution(p, 0, 0.5)[:2] == pytest.approx([0.8, 0.2], abs=1e-6)
    assert reference.distribution(p, 3, 0.5)[:2] == pytest.approx([0.8889, 0.1111], abs=1e-4)


def test_equal_logits_go_to_the_lowest_id(new_floor):
    floor, sampler = begun(new_floor, [(1, 0.0), (1, 0.0)], vocab=1000, padded=1000)
    greedy = Greedy()
    logits = torch.zeros(2, 1000)
    logits[0, :7] = -0.0
    logits[1, [300, 500, 900]] = 1.0
    batch = floor.logits_batch([0, 1])
    assert sampler.sample(logits, batch).tolist() == greedy.sample(logits, batch).tolist() == [0, 300]


def test_only_as_much_is_done_as_somebody_needs(new_floor):
    """The k largest in order, a search for the nucleus, a walk over all: each only where a live branch wants it."""
    floor, sampler = begun(new_floor, [(5, 0.0)], vocab=1000, padded=1024)
    assert sampler.graph_key[:3] == (8, False, False)
    sampler.begin(1, floor.view(1, [1], top_k=0, top_p=1.0))
    assert sampler.graph_key[:3] == (8, False, True)
    sampler.begin(2, floor.view(2, [1], top_k=0, top_p=0.9))
    assert sampler.graph_key[:3] == (8, True, True)
    sampler.end(2)
    sampler.end(0)
    assert sampler.graph_key[:3] == (0, False, True)


@pytest.mark.parametrize("cycle", [(1, 0), (1, 2, 0)])
def test_fork(cycle, new_floor, rng):
    choices = [(1, 0.0), (0, 0.7), (20, 0.9)]
    floor, sampler = begun(new_floor, choices, vocab=100, padded=100)
    floor.context.seeds[:] = 3
    floor.context.lengths[:] = 5
    logits = torch.from_numpy(rng.normal(0, 1, (1, 100)).astype(np.float32)).repeat(len(cycle), 1)
    before = sampler.sample(logits, floor.logits_batch(cycle))
    sampler.fork(torch.tensor(cycle), torch.arange(len(cycle)))
    assert torch.equal(sampler.sample(logits, floor.logits_batch(range(len(cycle)))), before)


def test_log_probs():
    logits = torch.randn(5, 30)
    tokens = torch.tensor([[3, 1], [0, 5], [29, 0], [7, 7], [7, 2]])
    want = logits.log_softmax(-1).gather(1, tokens)
    torch.testing.assert_close(log_probs(logits, tokens), want)
