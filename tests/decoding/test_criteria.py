"""The built-in device criteria."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core.decoding.criteria import EndId, MaxTokens, first_hit
from trtllm_core.decoding.stop_words import StopWords

tokens = st.lists(st.integers(0, 3), max_size=5)
words = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=4)


def started(new_floor, make, views, **sizes):
    floor = new_floor(**sizes)
    criterion = make()
    criterion.setup(floor.context)
    for slot, (prompt, end_ids, sampling) in views.items():
        criterion.begin(slot, floor.view(slot, prompt, end_ids, **sampling))
    return floor, criterion


def test_first_hit():
    hits = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    assert first_hit(hits).tolist() == [-1, 1, 0, 2]


def test_end_id(new_floor):
    views = {0: ([1], (2,), {}), 3: ([1], (7, 2, 9), {}), 5: ([1], (), {})}
    floor, criterion = started(new_floor, EndId, views)
    new = [[1, 7, 2], [1, 7, 2], [2, 2, 2], [1, 1, 1], [2], [2]]
    slots = [0, 3, 5, 3, 0, 3]
    batch = floor.commit_batch(slots, new, active=[True] * 5 + [False])
    assert criterion.check(batch).tolist() == [2, 1, -1, -1, 0, -1]
    assert (criterion.reason, criterion.counted) == ("end_id", False)


def test_end_id_looks_at_accepted_tokens_only(new_floor):
    floor, criterion = started(new_floor, EndId, {0: ([1], (10**9,), {}), 1: ([1], (10**9,), {})})
    assert criterion.check(floor.commit_batch([0, 1], [[1], [1, 1, 1]])).tolist() == [-1, -1]


def test_max_tokens(new_floor):
    views = {0: ([1] * 3, (), {"max_new_tokens": 2}), 1: ([1] * 46, (), {"max_new_tokens": 20})}
    floor, criterion = started(new_floor, MaxTokens, views)  # 48 tokens of room
    assert criterion.check(floor.commit_batch([0, 1], [[5], [5]])).tolist() == [-1, -1]
    assert criterion.check(floor.commit_batch([1, 0], [[5, 5], [5, 5, 5]])).tolist() == [1, 1]
    floor.append(0, [5])
    assert criterion.check(floor.commit_batch([0, 0], [[5], [5]], active=[True, False])).tolist() == [0, -1]
    assert criterion.check(floor.commit_batch([0, 1], [[], [5]])).tolist() == [-1, -1]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5), words, tokens, tokens), min_size=1, max_size=6
    )
)
@settings(max_examples=200, deadline=None)
def test_stop_words_are_suffixes_of_prompt_and_generated(new_floor, reference, rows):
    views = {slot: (prompt, (), {"stop_words_list": words}) for slot, (prompt, words, _, _) in enumerate(rows)}
    floor, criterion = started(new_floor, StopWords, views)
    for slot, (_, _, generated, _) in enumerate(rows):
        floor.append(slot, generated)
    order = list(reversed(range(len(rows))))
    got = criterion.check(floor.commit_batch(order, [rows[slot][3] for slot in order])).tolist()
    want = [reference.stop_at(floor.histories[slot], rows[slot][3], rows[slot][1]) for slot in order]
    assert got == want


def test_golden_stop_words(new_floor):
    """Appendix A, and a match that begins in the prompt."""
    views = {slot: (prompt, (), {"stop_words_list": [[2, 3]]}) for slot, prompt in enumerate([[1, 2], [5], [2]])}
    floor, criterion = started(new_floor, StopWords, views)
    assert criterion.check(floor.commit_batch([0, 1, 2], [[3], [3], [2, 3, 1, 2, 3]])).tolist() == [0, -1, 1]


@pytest.mark.parametrize("cycle", [(1, 0), (1, 2, 0)])
@pytest.mark.parametrize("make", [EndId, MaxTokens, StopWords])
def test_fork_is_simultaneous(make, cycle, new_floor):
    views = {
        0: ([1, 2], (3,), {"max_new_tokens": 1, "stop_words_list": [[2, 3]]}),
        1: ([1], (4, 5), {"max_new_tokens": 2, "stop_words_list": [[4], [1, 1, 1]]}),
        2: ([1, 1], (), {"max_new_tokens": 9}),
    }
    floor, criterion = started(new_floor, make, views)
    n = len(cycle)
    before = criterion.check(floor.commit_batch(cycle, [[3, 4, 3]] * n))
    floor.fork(cycle, range(n))
    criterion.fork(torch.tensor(cycle), torch.arange(n))
    assert torch.equal(criterion.check(floor.commit_batch(range(n), [[3, 4, 3]] * n)), before)


def test_criteria_say_what_matched(new_floor):
    _, words = started(new_floor, StopWords, {0: ([1, 2], (), {"stop_words_list": [[3], [2, 3], [4]]})})
    assert words.matched(0, [1, 2, 3]) == (2, 3), "the longest, prompt included"
    assert words.matched(0, [1, 2, 3, 4]) == (4,)
    assert EndId().matched(0, [1, 7]) == 7
    assert MaxTokens().matched(0, [1, 7]) is None
    words.end(0)
    assert words._lists == {}
