"""Accepting drafts on plain tensors: against a plain reference, the exact distribution, and what a session does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_core import ModelRunner, SamplingConfig, Session, accept_equal_drafts, accept_likely_drafts, use
from trtllm_core.config import BuildConfig
from trtllm_core.decoding.draft_model import DraftModel
from trtllm_core.decoding.random import slot_key, uniform
from trtllm_core.decoding.verifying import draw_from
from trtllm_core.errors import ConfigError
from trtllm_core.testing.markov import MarkovExecutable

VOCAB, MOST = 7, 4
COUNTS = [4, 0, 2, 1, 3]


def case(seed: int, rows: int = len(COUNTS)):
    """Logits, drafts and draft logits of rows with different numbers of drafts."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, MOST + 1, VOCAB, generator=g) * 2
    draft_logits = logits[:, :MOST] * 0.7 + torch.randn(rows, MOST, VOCAB, generator=g)
    drafts = torch.randint(VOCAB, (rows, MOST), generator=g)
    return logits, drafts, draft_logits


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row - row.max())
    return e / e.sum()


def plainly_equal(taken, drafts, count):
    for at in range(count):
        if taken[at] != drafts[at]:
            return at + 1
    return count + 1


def plainly_reached(logits, drafts, draft_logits, count, threshold):
    """How many drafts reach a threshold, and what the token behind them is drawn from."""
    for at in range(count):
        p, q = softmax(logits[at]), softmax(draft_logits[at])
        if p[drafts[at]] / q[drafts[at]] < threshold:
            rest = np.maximum(p - q, 0)
            return at, rest / rest.sum()
    return count, softmax(logits[count])


@pytest.mark.parametrize("seed", range(8))
def test_equal_ones_against_a_plain_reference(seed):
    g = torch.Generator().manual_seed(seed)
    taken = torch.randint(3, (5, MOST + 1), generator=g)
    drafts = torch.where(torch.rand(5, MOST, generator=g) < 0.7, taken[:, :-1], 0)
    expected = [plainly_equal(t, d, c) for t, d, c in zip(taken.numpy(), drafts.numpy(), COUNTS, strict=True)]
    assert accept_equal_drafts(taken, drafts.int(), torch.tensor(COUNTS)).tolist() == expected
    whole = [plainly_equal(t, d, MOST) for t, d in zip(taken.numpy(), drafts.numpy(), strict=True)]
    assert accept_equal_drafts(taken, drafts).tolist() == whole


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 5.0])
def test_a_threshold_against_a_plain_reference(threshold):
    lengths = set()
    for seed in range(20):
        logits, drafts, draft_logits = case(seed)
        tokens, sizes = accept_likely_drafts(
            logits, drafts, draft_logits, torch.tensor(COUNTS), positions=torch.arange(5), threshold=threshold
        )
        for row, count in enumerate(COUNTS):
            arrays = (each[row].double().numpy() for each in (logits, drafts, draft_logits))
            x, d, y = arrays
            accepted, rest = plainly_reached(x, d.astype(int), y, count, threshold)
            assert sizes[row] == accepted + 1
            assert tokens[row, :accepted].tolist() == drafts[row, :accepted].tolist()
            assert rest[tokens[row, accepted]] > 0, "drawn from what the draft's distribution lacks"
            lengths.add(accepted)
    assert threshold > 1 or lengths >= {0, 1, 2}


def test_each_row_may_have_a_threshold_of_its_own():
    logits, drafts, draft_logits = case(3)
    arguments = {"positions": torch.arange(5), "seeds": [1, 2, 3, 4, 5]}
    both = accept_likely_drafts(
        logits, drafts, draft_logits, threshold=torch.tensor([0.0, 9.9, 0.0, 9.9, 0.5]), **arguments
    )[1]
    assert both[[0, 2]].tolist() == [MOST + 1] * 2
    assert both[[1, 3]].tolist() == [1, 1]
    assert both[4] == accept_likely_drafts(logits, drafts, draft_logits, threshold=0.5, **arguments)[1][4]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_text_is_distributed_as_the_target_model(assert_distribution, count):
    """All texts of ``count`` + 1 tokens, from drafts that are drawn from q: of probability p each."""
    n, vocab = 20000, 4
    g = torch.Generator().manual_seed(count)
    logits, draft_logits = torch.randn(3, vocab, generator=g), torch.randn(2, vocab, generator=g) * 1.5
    q = draft_logits.softmax(1)
    drafts = torch.stack([torch.multinomial(q[at], n, True, generator=g) for at in range(2)], dim=1)
    tokens, sizes = accept_likely_drafts(
        logits.expand(n, -1, -1),
        drafts,
        draft_logits.expand(n, -1, -1),
        torch.full((n,), count),
        positions=torch.zeros(n, dtype=torch.int64),
        seeds=range(n),
    )
    assert sizes.max() == count + 1
    p = logits.softmax(1).double().numpy()
    for at in range(count + 1):  # of all rows that come so far, the token there is one of p
        there = tokens[sizes > at, at]
        assert_distribution(np.bincount(there.numpy(), minlength=vocab), p[at])
    if count:
        chance = np.minimum(p[0], q[0].double().numpy()).sum()
        first = (sizes > 1).sum().item()
        assert_distribution(np.array([first, n - first]), np.array([chance, 1 - chance]))


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5])
def test_the_tokens_are_those_of_a_session(threshold):
    """Driven by hand with the same logits, seeds and positions, they are the decoder's."""
    build = BuildConfig(max_batch_size=1, max_input_len=8, max_seq_len=40, tokens_per_block=4)
    large = MarkovExecutable(13, seed=1, build=build)
    noise = torch.randn(13, 13, generator=torch.Generator().manual_seed(4))
    small = MarkovExecutable(13, build=build, table=large.table * 0.6 + noise * 0.8)
    config = SamplingConfig(top_k=0, top_p=1.0, end_id=(), max_new_tokens=24, random_seed=5, return_dict=True)
    config = config.replace(draft_acceptance_threshold=threshold)
    decoder = use("draft_model", session=Session.from_engine(small), tokens=3)
    expected = ModelRunner.from_engine(large).generate([[4]], config, decoder=decoder)["outputs"][0]

    def drafted(text, k):
        """As the decoder draws them: from q, by the counters of its drafts."""
        rows, drafts = [], []
        for at in range(k):
            rows.append(small.table[[*text, *drafts][-1]])
            u = uniform(torch.tensor([slot_key(5, 0)]), torch.tensor([len(text) + at]), DraftModel.DRAFT)
            drafts.append(int(draw_from(rows[-1].softmax(0).unsqueeze(0), u)))
        return drafts, rows

    text = [4]
    while len(text) < 25:
        k = min(3, 24 - len(text))  # no draft where there may be no token
        drafts, rows = drafted(text, k)
        logits = torch.stack([large.table[token] for token in [text[-1], *drafts]])
        tokens, sizes = accept_likely_drafts(
            logits.unsqueeze(0),
            torch.tensor([drafts], dtype=torch.int64).view(1, k),
            torch.stack(rows).unsqueeze(0) if k else torch.zeros(1, 0, 13),
            positions=torch.tensor([len(text)]),
            seeds=5,
            threshold=threshold,
        )
        text += tokens[0, : int(sizes[0])].tolist()
    assert tuple(text[1:25]) == expected.tokens
    assert expected.accepted_tokens > 0


def test_a_token_that_cannot_be_is_minus_one():
    logits = torch.full((1, 1, 3), -torch.inf)
    tokens, sizes = accept_likely_drafts(
        logits, torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, 3), positions=torch.zeros(1, dtype=torch.int64)
    )
    assert (tokens.tolist(), sizes.tolist()) == ([[-1]], [1])


def test_shapes_that_do_not_fit_are_refused():
    logits, drafts, draft_logits = case(0)
    with pytest.raises(ConfigError, match=r"drafts \[5, 4\] with counts none do not fit to \[5, 4\]"):
        accept_equal_drafts(drafts, drafts)
    with pytest.raises(ConfigError, match=r"with counts \[2\]"):
        accept_likely_drafts(logits, drafts, draft_logits, torch.tensor([1, 2]), positions=torch.arange(5))
    with pytest.raises(ConfigError, match=r"draft_logits \[5, 3, 7\], positions \[5\] and 5 seeds"):
        accept_likely_drafts(logits, drafts, draft_logits[:, 1:], positions=torch.arange(5))
    with pytest.raises(ConfigError, match="and 2 seeds do not fit"):
        accept_likely_drafts(logits, drafts, draft_logits, positions=torch.arange(5), seeds=[1, 2])
    with pytest.raises(ConfigError, match="2 thresholds do not fit to 5 rows"):
        accept_likely_drafts(
            logits, drafts, draft_logits, positions=torch.arange(5), threshold=torch.tensor([0.1, 0.2])
        )


def test_what_stands_behind_the_counts_may_be_anything():
    logits, drafts, draft_logits = case(3)
    counts, behind = torch.tensor(COUNTS), torch.arange(MOST) >= torch.tensor(COUNTS).unsqueeze(1)
    wanted = accept_likely_drafts(logits, drafts, draft_logits, counts, positions=torch.arange(5))
    for padding in (-1, -100, VOCAB, 10**6):
        padded = drafts.masked_fill(behind, padding)
        tokens, sizes = accept_likely_drafts(logits, padded, draft_logits, counts, positions=torch.arange(5))
        assert torch.equal(sizes, wanted[1])
        for row, size in enumerate(sizes.tolist()):
            assert tokens[row, :size].tolist() == wanted[0][row, :size].tolist()
