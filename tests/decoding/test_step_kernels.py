"""The kernels of every step against their plain twins: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trtllm_core.decoding.kernels.commit import commit_one
from trtllm_core.decoding.kernels.ends import end_tokens, limits_reached
from trtllm_core.decoding.kernels.greedy import CHUNK, largest_logit
from trtllm_core.decoding.samplers import possible

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [7, CHUNK, 3 * CHUNK + 5])
def test_the_largest_logit(device: str, vocab: int) -> None:
    logits = torch.randn(6, vocab + 3)[:, :vocab]
    logits[1] = logits[1].round()  # many equals
    logits[2] = 1.5
    logits[3, 1:] = -torch.inf
    logits[4] = -torch.inf
    logits[5, vocab // 2] = torch.nan
    logits = logits.to(device)
    assert torch.equal(largest_logit(logits), possible(logits, logits.argmax(dim=1)))
    assert largest_logit(logits)[4] == -1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_one_token_a_row_becomes_history(device: str, rows: int) -> None:
    slots, longest, vocab = 300, 9, 50
    slot = torch.randperm(slots)[:rows].to(device)
    chosen = torch.randint(-3, vocab + 3, (rows, 2), device=device)[:, :1]
    counts = torch.randint(0, 2, (rows,), device=device)
    history = torch.randint(0, vocab, (slots, longest), dtype=torch.int32, device=device)
    lengths = torch.randint(0, longest + 2, (slots,), device=device)
    want_history, want_lengths = history.clone(), lengths.clone()
    tokens, newest = commit_one(slot, chosen, counts, history, lengths, vocab)
    want = chosen.clamp(0, vocab - 1)
    for s, token, count in zip(slot.tolist(), want[:, 0].tolist(), counts.tolist(), strict=True):
        if count:
            want_history[s, min(int(want_lengths[s]), longest - 1)] = token
            want_lengths[s] += 1
    assert torch.equal(tokens, want)
    assert torch.equal(newest, want[:, 0].int())
    assert torch.equal(history, want_history)
    assert torch.equal(lengths, want_lengths)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 3, 40])
def test_ends_and_limits(device: str, width: int) -> None:
    rows, slots = 150, 160
    slot = torch.randperm(slots)[:rows].to(device)
    tokens = torch.randint(0, 12, (rows, 3), device=device)[:, 1:2]
    counts = torch.randint(0, 2, (rows,), device=device)
    active = torch.rand(rows, device=device) < 0.8
    ends = torch.randint(-1, 12, (slots, width), device=device)
    hits = (ends[slot] == tokens).any(1) & (counts > 0) & active
    assert torch.equal(end_tokens(slot, tokens, counts, active, ends), hits.long() - 1)
    counts = torch.randint(0, 5, (rows,), device=device)
    lengths, limits = (torch.randint(0, 20, (slots,), device=device) for _ in range(2))
    last = (limits - lengths - 1).clamp(min=0)[slot]
    assert torch.equal(
        limits_reached(slot, counts, active, lengths, limits), torch.where(active & (last < counts), last, -1)
    )
