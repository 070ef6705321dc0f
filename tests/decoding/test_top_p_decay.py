"""Factual-nucleus sampling: p falls with the text, starts anew at a token, and follows drafts, rewinds and forks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_core.decoding import samplers
from trtllm_core.decoding.samplers import TopKTopP
from trtllm_core.decoding.top_p_decay import TopPDecay


def reference(p, decay, least, reset, tokens):
    """Appendix A: ``next_top_p`` over the generated tokens."""
    now = p
    for token in tokens:
        now = p if token == reset else max(now * decay, least)
    return now


def begun(new_floor, wishes, prompts=None, **sizes):
    floor = new_floor(**sizes)
    decay = TopPDecay(floor.context)
    for slot, wish in enumerate(wishes):
        view = floor.view(slot, prompts[slot] if prompts else [99 % floor.vocab] * (slot + 1), top_k=0, **wish)
        decay.begin(slot, view.sampling)
    return floor, decay


def now(floor, decay, slots, p, **batch):
    return decay.apply(torch.tensor(p), floor.logits_batch(slots, **batch)).tolist()


def test_golden(new_floor):
    wish = {"top_p": 0.8, "top_p_decay": 0.5, "top_p_min": 0.3, "top_p_reset_ids": 99}
    floor, decay = begun(new_floor, [wish], [[99, 99]], vocab=120)
    assert now(floor, decay, [0], [0.8]) == pytest.approx([0.8])
    for token, p in zip([11, 12, 99, 13, 14], [0.4, 0.3, 0.8, 0.4, 0.3], strict=True):
        floor.append(0, [token])
        assert now(floor, decay, [0], [0.8]) == pytest.approx([p])


def test_any_text_drafts_rewinds_and_forks(new_floor, rng):
    wishes = [
        {"top_p": 0.9, "top_p_decay": 0.8, "top_p_reset_ids": 3},
        {"top_p": 0.9, "top_p_decay": 0.8},
        {"top_p": 0.4, "top_p_decay": 0.9, "top_p_min": 0.6, "top_p_reset_ids": -1},
        {"top_p": 0.7},
        {"top_p": 1.0, "top_p_decay": 0.5, "top_p_reset_ids": 1},
        {"top_p": 0.3, "top_p_min": 0.5},
    ]
    floor, decay = begun(new_floor, wishes)
    start = [wish["top_p"] for wish in wishes]
    prompt = [slot + 1 for slot in range(6)]

    def wanted(slot, tokens):
        wish = wishes[slot]
        if "top_p_decay" not in wish and "top_p_min" not in wish:
            return start[slot]
        least = wish.get("top_p_min", 1e-6)
        return reference(start[slot], wish.get("top_p_decay", 1.0), least, wish.get("top_p_reset_ids", -1), tokens)

    for turn in range(12):
        for slot in range(6):
            floor.append(slot, rng.integers(0, 6, rng.integers(0, 3)).tolist())
        if turn % 3 == 2:
            floor.rewind(1, 1)
        got = now(floor, decay, range(6), start)
        assert got == pytest.approx([wanted(s, floor.histories[s][prompt[s] :]) for s in range(6)], rel=1e-5)
    draft = rng.integers(0, 6, (6, 4))
    slots, offsets = np.repeat(np.arange(6), 5).tolist(), np.tile(np.arange(5), 6).tolist()
    got = now(floor, decay, slots, [start[slot] for slot in slots], offsets=offsets, draft=draft)
    texts = [floor.histories[s][prompt[s] :] + draft[s, :o].tolist() for s, o in zip(slots, offsets, strict=True)]
    assert got == pytest.approx([wanted(s, t) for s, t in zip(slots, texts, strict=True)], rel=1e-5)


def test_slots_without_decay_cost_nothing(new_floor):
    floor, decay = begun(new_floor, [{"top_p": 0.9}])
    assert decay.key == (False, False)
    p = torch.tensor([0.9])
    assert decay.apply(p, floor.logits_batch([0])) is p
    decay.begin(1, floor.view(1, [1], top_p_decay=0.5).sampling)
    assert decay.key == (True, False)
    decay.end(1)
    assert decay.key == (False, False)


def test_the_sampler_draws_from_the_shrunken_nucleus(new_floor, reference, assert_distribution, monkeypatch):
    draws = 20_000
    u = 1 - torch.rand(draws, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(samplers, "batch_uniform", lambda batch, salt: u)
    x = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    floor, sampler = new_floor(vocab=4, padded=4), TopKTopP()
    sampler.setup(floor.context)
    sampler.begin(0, floor.view(0, [1], top_k=0, top_p=1.0, top_p_decay=0.5))
    for p in (1.0, 0.5, 0.25):
        tokens = sampler.sample(x.repeat(draws, 1), floor.logits_batch([0] * draws))
        assert_distribution(np.bincount(tokens.numpy(), minlength=4), reference.distribution(x.numpy(), 0, p))
        floor.append(0, [2])
