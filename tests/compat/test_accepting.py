"""The static methods of ``GptDecoder`` that accept drafts, against plain references of their documented semantics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_core.compat.tensorrt_llm.bindings import FinishedState, GptDecoder
from trtllm_core.errors import ConfigError

SLOTS, MOST, VOCAB, PADDED, LONGEST = 5, 3, 6, 8, 12
BATCH = [3, 0, 4]  # slots at work: out of order, and not all


def plainly_by_ids(target, drafts, start, count, length):
    for at in range(start, min(length, start + count)):
        if drafts[at - start] != target[at]:
            return at - start, at + 1
    return min(length - start, count), length


@pytest.mark.parametrize("seed", range(6))
def test_by_ids(seed):
    rng = np.random.default_rng(seed)
    start = rng.integers(1, 5, SLOTS)
    counts = np.array([2, 3, 1, 0, 3])
    lengths = start + counts + 1
    target = rng.integers(0, 3, (SLOTS, LONGEST))
    drafts = np.stack([target[slot, start[slot] : start[slot] + MOST] for slot in range(SLOTS)])
    drafts = np.where(rng.random(drafts.shape) < 0.3, 7, drafts)
    finished = rng.choice([0, 1, 2, 4, 8], (MOST + 1, SLOTS)).astype(np.uint8)
    out, final, total = (
        torch.tensor(each) for each in (lengths.astype(np.int32), np.full(SLOTS, 99), np.full(SLOTS, 99))
    )
    GptDecoder.accept_draft_tokens_by_ids(
        torch.tensor(target, dtype=torch.int32),
        torch.tensor(drafts, dtype=torch.int32),
        torch.tensor(start, dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
        out,
        torch.tensor(finished),
        final,
        total,
        torch.tensor(BATCH, dtype=torch.int32),
    )
    for slot in range(SLOTS):
        accepted, length = plainly_by_ids(target[slot], drafts[slot], start[slot], counts[slot], lengths[slot])
        if slot not in BATCH:
            accepted = None
        state = 99 if accepted is None else finished[accepted, slot]
        ends = 99 if accepted is None else int(state in (1, 2, 4))
        assert (out[slot], final[slot], total[slot]) == (lengths[slot] if accepted is None else length, state, ends)


def tensors(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    target = [torch.randn(MOST + 1, PADDED, generator=g) for _ in BATCH]
    draft = torch.randn(SLOTS, MOST, PADDED, generator=g) * 0.3
    for slot, rows in zip(BATCH, target, strict=True):
        draft[slot] += rows[:MOST]
    for each in (draft, *target):
        each[..., VOCAB:] = 50.0  # nobody may look there
    finished = torch.full((MOST + 1, SLOTS), 99, dtype=torch.uint8)
    return draft, target, torch.zeros(SLOTS, MOST, PADDED), torch.zeros(SLOTS, MOST, PADDED), finished


def softmax(row):
    e = np.exp(row[:VOCAB] - row[:VOCAB].max())
    return e / e.sum()


COUNTS = torch.tensor([2, 0, 0, 3, 1])


@pytest.mark.parametrize("by_draft", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9, 3.0])
def test_by_logits_with_a_threshold(by_draft, threshold):
    seen = set()
    for seed in range(10):
        draft, target, q, p, finished = tensors(seed)
        before = [rows.clone() for rows in target]
        ids = torch.randint(VOCAB, (SLOTS, MOST), generator=torch.Generator().manual_seed(seed))
        GptDecoder.accept_draft_tokens_by_logits(
            draft, target, q, p, COUNTS, finished, torch.tensor(BATCH), VOCAB, PADDED, False, threshold,
            draft_token_ids=ids if by_draft else None,
        )  # fmt: skip
        for entry, slot in enumerate(BATCH):
            count, accepted = int(COUNTS[slot]), 0
            while accepted < count:
                ours, theirs = softmax(before[entry][accepted].numpy()), softmax(draft[slot, accepted].numpy())
                looked = ids[slot, accepted] if by_draft else slice(None)
                if np.any(ours[looked] < threshold * theirs[looked]):
                    break
                accepted += 1
            seen.add((count, accepted))
            states = finished[: count + 1, slot].tolist()
            assert states == [0] * (accepted + 1) + [int(FinishedState.SKIP_DECODING)] * (count - accepted)
            for at in range(MOST + 1):
                if at != accepted or accepted == count:
                    assert torch.equal(target[entry][at], before[entry][at])
            if accepted < count:
                rest = np.maximum(ours - theirs, 0)
                np.testing.assert_allclose(target[entry][accepted].softmax(0)[:VOCAB], rest / rest.sum(), atol=1e-5)
                np.testing.assert_allclose(p[slot, accepted, :VOCAB], rest, atol=1e-6)
            np.testing.assert_allclose(q[slot, 0, :VOCAB], softmax(draft[slot, 0].numpy()), atol=1e-6)
        assert (finished[:, [1, 2]] == 99).all()
    assert len(seen) >= (3 if threshold == 0 else 4) or threshold == 3.0


def accepted_first(n: int, target, draft, drafts=None):
    """How many of ``n`` rows accept their one draft, and what the others' logits have become."""
    rows = target.expand(n, 2, -1).clone()
    finished = torch.zeros(2, n, dtype=torch.uint8)
    GptDecoder.accept_draft_tokens_by_logits(
        draft.expand(n, 1, -1), rows, torch.zeros(n, 1, 4), torch.zeros(n, 1, 4), torch.ones(n, dtype=torch.int32),
        finished, None, 4, 4, True, 0.0, torch.Generator().manual_seed(1), draft_token_ids=drafts,
    )  # fmt: skip
    return finished[1] == 0, rows[:, 0]


def test_by_logits_with_random_numbers_keeps_the_distribution(assert_distribution):
    """The drafted token where it is accepted, else a sample of the corrected logits: one of the target model's."""
    n, g = 20000, torch.Generator().manual_seed(0)
    target, draft = torch.randn(4, generator=g), torch.randn(4, generator=g)
    drafts = torch.multinomial(draft.softmax(0), n, True, generator=g)
    accepted, logits = accepted_first(n, target, draft, drafts.unsqueeze(1))
    sampled = torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)
    tokens = torch.where(accepted, drafts, sampled)
    assert_distribution(np.bincount(tokens.numpy(), minlength=4), target.softmax(0).double().numpy())


def test_by_logits_without_ids_holds_whole_distributions_against_each_other(assert_distribution):
    """Each token with a number of its own: accepted with the product of ``min(1, p / q)`` over the vocabulary."""
    n, g = 20000, torch.Generator().manual_seed(0)
    target = torch.randn(4, generator=g)
    draft = target + torch.randn(4, generator=g) * 0.3
    accepted, _ = accepted_first(n, target, draft)
    chance = (target.softmax(0) / draft.softmax(0)).clamp(max=1).prod().item()
    assert 0.05 < chance < 0.95
    first = int(accepted.sum())
    assert_distribution(np.array([first, n - first]), np.array([chance, 1 - chance]))


def test_logits_of_another_width_are_refused():
    draft, target, q, p, finished = tensors()
    with pytest.raises(ConfigError, match="not vocab_size_padded = 9 wide"):
        GptDecoder.accept_draft_tokens_by_logits(
            draft, target, q, p, COUNTS, finished, torch.tensor(BATCH), VOCAB, 9, False, 0.5
        )
