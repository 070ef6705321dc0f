"""Mirostat 2 against a plain walk, its distribution, and its mu through commits, rewinds and forks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trtllm_core.decoding.mirostat import Mirostat
from trtllm_core.decoding.random import batch_uniform


def begun(new_floor, params=(), slots=4, vocab=24):
    floor, sampler = new_floor(slots=slots, vocab=vocab, padded=vocab), Mirostat()
    sampler.setup(floor.context)
    for slot in range(slots):
        given = Mirostat.Params(**(params[slot] if params else {}))
        sampler.begin(slot, floor.view(slot, [1] * (slot + 1), params=given))
    return floor, sampler


def step(floor, sampler, slots, x):
    """Sample a token for each slot from its row of ``x``, and commit it."""
    rows = torch.from_numpy(x)
    tokens = sampler.sample(rows.clone(), floor.logits_batch(slots)).tolist()
    for slot, token in zip(slots, tokens, strict=True):
        floor.append(slot, [token])
    new = [[token] for token in tokens]
    sampler.commit(floor.commit_batch(slots, new, logits=rows, source=[[row] for row in range(len(slots))]))
    return tokens


class Plain:
    """One sequence, in float64."""

    def __init__(self, tau, eta):
        self.tau, self.eta, self.mu = tau, eta, 2 * tau

    def kept(self, x):
        p = np.exp(x - x.max())
        p /= p.sum()
        keep = (-np.log2(p) <= self.mu) | (p == p.max())
        return np.where(keep, p, 0) / p[keep].sum()

    def step(self, x, u):
        q = self.kept(x)
        token = int(np.searchsorted(np.cumsum(q), u))
        self.mu -= self.eta * (-math.log2(q[token]) - self.tau)
        return token


def test_against_a_plain_walk(new_floor, rng):
    params = [{}, {"tau": 1.0, "eta": 0.5}, {"tau": 3.0, "eta": 0.0}, {"tau": 0.1, "eta": 1.0}]
    floor, sampler = begun(new_floor, params)
    plain = [Plain(p.get("tau", 5.0), p.get("eta", 0.1)) for p in params]
    for _ in range(30):
        slots = rng.permutation(4)[: rng.integers(1, 5)].tolist()
        x = rng.normal(0, 2.5, (len(slots), 24)).astype(np.float32)
        u = batch_uniform(floor.logits_batch(slots), Mirostat.SALT).tolist()
        got = step(floor, sampler, slots, x)
        assert got == [
            plain[slot].step(row.astype(np.float64), one) for slot, row, one in zip(slots, x, u, strict=True)
        ]
    for slot in range(4):
        assert float(sampler._mu[slot, len(floor.histories[slot])]) == pytest.approx(plain[slot].mu, abs=1e-4)


@pytest.mark.parametrize("tau", [0.5, 1.5, 5.0])
def test_distribution(tau, new_floor, assert_distribution, rng):
    draws = 40_000
    x = rng.normal(0, 2, 24).astype(np.float32)
    floor, sampler = begun(new_floor, [{"tau": tau}], slots=1)
    batch = floor.logits_batch([0] * draws, offsets=range(draws))
    tokens = sampler.sample(torch.from_numpy(x).repeat(draws, 1), batch)
    expected = Plain(tau, 0.1).kept(x.astype(np.float64))
    assert_distribution(np.bincount(tokens.numpy(), minlength=24), expected)


def test_surprise_stays_near_the_target(new_floor, rng):
    """Among the tokens that are left, with a model whose own surprise is twice as much and changes all the time."""
    floor, sampler = new_floor(slots=1, vocab=2000, padded=2000, max_seq_len=600), Mirostat()
    sampler.setup(floor.context)
    sampler.begin(0, floor.view(0, [1], params=Mirostat.Params(tau=3.0)))
    entropies = []
    for spread in range(400):
        x = rng.normal(0, 1 + spread % 3, (1, 2000)).astype(np.float32)
        rows = torch.from_numpy(x)
        entropies.append(float(-(rows.softmax(1) * rows.log_softmax(1)).sum() / math.log(2)))
        step(floor, sampler, [0], x)
    surprise = 3.0 - sampler._mu[0, 1:402].diff() / 0.1
    assert float(surprise[100:].mean()) == pytest.approx(3.0, abs=0.3)
    assert np.mean(entropies) > 6


def test_mu_follows_rewinds_and_forks(new_floor, rng):
    """What is sampled after a rewind or in a fork is what would have been sampled without."""
    x = rng.normal(0, 2, (12, 1, 24)).astype(np.float32)

    def generate(floor, sampler, slot, steps):
        for at in steps:
            step(floor, sampler, [slot], x[at])

    params = [{"tau": 1.0, "eta": 0.7}] * 4
    floor, sampler = begun(new_floor, params)
    generate(floor, sampler, 0, range(10))
    straight, mu = list(floor.histories[0]), sampler._mu[0, 11].clone()
    floor.rewind(0, 6)
    sampler.rewind(0, 6)
    generate(floor, sampler, 0, range(4, 10))
    assert floor.histories[0] == straight
    assert sampler._mu[0, 11] == mu
    generate(floor, sampler, 1, range(10))
    other = list(floor.histories[1])
    floor.fork((1, 0), (0, 1))
    sampler.fork(torch.tensor([1, 0]), torch.tensor([0, 1]))
    floor.context.seeds[[0, 1]] = floor.context.seeds[[1, 0]]
    generate(floor, sampler, 0, [10])
    generate(floor, sampler, 1, [10])
    floor2, sampler2 = begun(new_floor, params)
    generate(floor2, sampler2, 0, range(11))
    generate(floor2, sampler2, 1, range(11))
    assert (floor.histories[1], floor.histories[0]) == (floor2.histories[0], floor2.histories[1])
    assert other == floor2.histories[1][:-1]


def test_what_moves_no_mu(new_floor, rng):
    """Sampling, tokens of other decoders' rows, and tokens that could not be drawn."""
    floor, sampler = begun(new_floor)
    before = sampler._mu.clone()
    x = torch.from_numpy(rng.normal(0, 2, (4, 24)).astype(np.float32))
    x[:, 7] = -torch.inf
    sampler.sample(x.clone(), floor.logits_batch(range(4)))
    assert torch.equal(sampler._mu, before)
    for slot in range(4):
        floor.append(slot, [7])
    sources = [[row] for row in range(4)]
    sampler.commit(floor.commit_batch(range(4), [[3]] * 4, [False] * 4, x, sources))
    assert torch.equal(sampler._mu, before)
    sampler.commit(floor.commit_batch(range(4), [[7]] * 4, logits=x, source=sources))
    for slot in range(4):
        length = len(floor.histories[slot])
        assert sampler._mu[slot, length] == before[slot, length - 1]
