"""The built-in device processors against the plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core.decoding.bans import BadWords, NoRepeatNgram
from trtllm_core.decoding.penalties import Penalties
from trtllm_core.decoding.processors import EmbeddingBias, MinLength, Temperature
from trtllm_core.decoding.truncation import MinP
from trtllm_core.errors import ConfigError

WORDS = ((4,), (1, 2, 5), (2, 3), (1, 3), (7, 1, 1, 2))
CASES = {
    "embedding_bias": (
        EmbeddingBias,
        [
            {"embedding_bias": {3: 1.5, 0: -2.0}},
            {"embedding_bias": {i: 0.1 * i for i in range(30)}},
            {"embedding_bias": [0.0, 2.0, *[0.3] * 38]},
            {},
        ],
        lambda r, x, f, ids, s: r.bias(x, s.embedding_bias or {}),
    ),
    "temperature": (
        Temperature,
        [{"temperature": 0.5}, {"temperature": 1.7, "preset": "hf"}, {"temperature": 0.01}, {"temperature": 0.0}],
        lambda r, x, f, ids, s: r.temperature(x, s.temperature or 1.0, s.preset),
    ),
    "min_p": (
        MinP,
        [{"min_p": 0.1}, {"min_p": 0.7}, {"min_p": 0.0}, {"min_p": 1.0}],
        lambda r, x, f, ids, s: r.min_p(x, s.min_p),
    ),
    "min_length": (
        MinLength,
        [
            {"min_length": 1},
            {"min_length": 3, "preset": "hf"},
            {"min_length": 0},
            {"min_length": 9},
            {"min_sequence_length": 11, "preset": "hf"},
            {"min_length": 4, "min_sequence_length": 6},
        ],
        lambda r, x, f, ids, s: r.min_length(
            x, len(ids) - f.prompt, max(s.min_length, s.min_sequence_length - f.prompt), f.end_ids, s.preset
        ),
    ),
    "penalties": (
        Penalties,
        [
            {"repetition_penalty": 1.3},
            {"repetition_penalty": 0.8, "presence_penalty": 0.5},
            {"frequency_penalty": 0.25, "presence_penalty": -0.1, "prompt_ignore_length": 2},
            {"repetition_penalty": 1.3, "presence_penalty": 0.5, "prompt_ignore_length": 3},
            {"repetition_penalty": 1.2, "frequency_penalty": 0.25, "prompt_ignore_length": 10**6},
        ],
        lambda r, x, f, ids, s: r.penalties(
            x,
            ids,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
            min(s.prompt_ignore_length, f.prompt),
        ),
    ),
    "no_repeat_ngram": (
        NoRepeatNgram,
        [{"no_repeat_ngram_size": n} for n in (2, 3, 1, 0, 10**6)],
        lambda r, x, f, ids, s: r.no_repeat_ngram(x, ids, s.no_repeat_ngram_size),
    ),
    "bad_words": (
        BadWords,
        [
            {"bad_words_list": WORDS},
            {"bad_words_list": ((2,),)},
            {"bad_words_list": ((1, 2, 1, 2, 3, 4, 0), (5, 5))},
            {"bad_words_list": ((1,), (3,), (2, 1)), "preset": "hf"},
        ],
        lambda r, x, f, ids, s: r.bad_words(
            x, ids, [w for w in s.bad_words_list if s.preset != "hf" or len(w) > 1 or w[0] not in f.end_ids]
        ),
    ),
}


class Facts:
    """What a case may know of a slot beside its ids."""

    def __init__(self, prompt, end_ids):
        self.prompt, self.end_ids = prompt, end_ids


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def start(new_floor, case, rng, **sizes):
    """Six branches, begun after each other, each with its own request, prompt and a few tokens."""
    make, requests, expected = case
    floor = new_floor(**sizes)
    plugin = make()
    plugin.setup(floor.context)
    views = {}
    for slot in rng.permutation(6).tolist():
        prompt = rng.integers(0, 6, rng.integers(1, 12)).tolist()
        views[slot] = floor.view(slot, prompt, ((3,), (2, 5, 1))[slot % 2], **requests[slot % len(requests)])
        plugin.begin(slot, views[slot])
    facts = {slot: Facts(len(view.prompt), view.end_ids) for slot, view in views.items()}
    return floor, plugin, lambda r, x, slot, ids: expected(r, x, facts[slot], ids, views[slot].sampling)


def commit(floor, plugin, slots, new):
    for slot, tokens in zip(slots, new, strict=True):
        floor.append(slot, tokens)
    plugin.commit(floor.commit_batch(slots, new))


def compare(got, want):
    np.testing.assert_allclose(got.numpy(), np.stack(want), rtol=2e-6, atol=1e-6)


def test_against_the_reference_with_rows_in_any_order(case, new_floor, reference, rng):
    floor, plugin, expected = start(new_floor, case, rng)
    for _ in range(6):
        slots = rng.permutation(6)[: rng.integers(1, 7)].tolist()
        active = (rng.random(len(slots)) < 0.8).tolist()
        raw = rng.normal(0, 3, (len(slots), floor.padded)).astype(np.float32)
        logits = torch.from_numpy(raw.copy())
        result = plugin.apply(logits, floor.logits_batch(slots, active))
        want = [
            expected(reference, x, slot, floor.histories[slot]) if on else x
            for x, slot, on in zip(raw, slots, active, strict=True)
        ]
        compare(logits if result is None else result, want)
        commit(floor, plugin, slots, [rng.integers(0, 6, rng.integers(0, 4)).tolist() for _ in slots])


def test_verify_positions_see_the_drafts_before_them(case, new_floor, reference, rng):
    floor, plugin, expected = start(new_floor, case, rng)
    draft = rng.integers(0, 6, (6, 4))
    slots = np.repeat(rng.permutation(6)[:4], 5)
    offsets = np.tile(np.arange(5), 4)
    raw = rng.normal(0, 3, (len(slots), floor.padded)).astype(np.float32)
    logits = torch.from_numpy(raw.copy())
    plugin.apply(logits, floor.logits_batch(slots.tolist(), offsets=offsets.tolist(), draft=draft))
    want = [
        expected(reference, x, slot, floor.histories[slot] + draft[slot, :offset].tolist())
        for x, slot, offset in zip(raw, slots, offsets, strict=True)
    ]
    compare(logits, want)


@pytest.mark.parametrize("cycle", [(1, 0), (1, 2, 0)])
def test_fork_is_simultaneous(case, new_floor, reference, rng, cycle):
    floor, plugin, _ = start(new_floor, case, rng)
    commit(floor, plugin, range(6), [[1, 2], [2], [3, 1, 1], [0], [5], [1]])
    n = len(cycle)
    raw = torch.from_numpy(rng.normal(0, 3, (1, floor.padded)).astype(np.float32)).expand(n, -1)
    before, after = raw.clone(), raw.clone()
    plugin.apply(before, floor.logits_batch(list(cycle)))
    floor.fork(cycle, range(n))
    plugin.fork(torch.tensor(cycle), torch.arange(n))
    plugin.apply(after, floor.logits_batch(list(range(n))))
    assert torch.equal(before, after)


def test_apply_changes_no_state_and_reused_slots_start_anew(case, new_floor, reference, rng):
    floor, plugin, _ = start(new_floor, case, rng)
    raw = rng.normal(0, 3, (2, floor.padded)).astype(np.float32)
    once, twice = torch.from_numpy(raw.copy()), torch.from_numpy(raw.copy())
    plugin.apply(once, floor.logits_batch([4, 1]))
    plugin.apply(twice, floor.logits_batch([4, 1]))
    assert torch.equal(once, twice)
    make, requests, _ = case
    for slot in (4, 1):
        plugin.end(slot)
    fresh = make()
    fresh.setup(floor.context)
    for slot in (4, 1):
        view = floor.view(slot, [1, 2, 3], (7,), **requests[0])
        plugin.begin(slot, view)
        fresh.begin(slot, view)
    a, b = torch.from_numpy(raw.copy()), torch.from_numpy(raw.copy())
    plugin.apply(a, floor.logits_batch([1, 4]))
    fresh.apply(b, floor.logits_batch([1, 4]))
    assert torch.equal(a, b)


def test_golden_values_of_the_classic_order(new_floor):
    """Appendix A: bias, temperature, penalties and minimum length in one go."""
    for least, third in ((1, None), (2, -3.4028234663852886e38)):
        floor = new_floor(vocab=4, padded=4)
        view = floor.view(
            0, [0, 0], (3,), temperature=0.5, repetition_penalty=2.0, presence_penalty=0.1, frequency_penalty=0.2,
            min_length=least,
        )  # fmt: skip
        plugins = [Temperature(), Penalties(), MinLength()]
        for plugin in plugins:
            plugin.setup(floor.context)
            plugin.begin(0, view)
        floor.append(0, [2])
        logits = torch.tensor([[2.0, 1.0, -1.0, 0.5]])
        for plugin in plugins:
            plugin.commit(floor.commit_batch([0], [[2]]))
            plugin.apply(logits, floor.logits_batch([0]))
        assert logits[0].tolist() == pytest.approx([1.5, 2.0, -4.3, 1.0 if third is None else third], rel=1e-5)


def test_golden_bans(new_floor):
    floor = new_floor(vocab=6, padded=6)
    words, ngram = BadWords(), NoRepeatNgram()
    for plugin in (words, ngram):
        plugin.setup(floor.context)
    words.begin(0, floor.view(0, [1, 2], bad_words_list=[[4], [1, 2, 5], [2, 3], [1, 3]]))
    ngram.begin(1, floor.view(1, [1, 2, 3, 1, 2], no_repeat_ngram_size=3))
    logits = torch.zeros(2, 6)
    words.apply(logits, floor.logits_batch([0, 1], active=[True, False]))
    ngram.apply(logits, floor.logits_batch([0, 1], active=[False, True]))
    assert [row.isinf().nonzero().flatten().tolist() for row in logits] == [[3, 4, 5], [3]]


@pytest.mark.parametrize(
    ("make", "wish", "words"),
    [
        (EmbeddingBias, {"embedding_bias": {40: 1.0}}, "not in the vocabulary of 40"),
        (EmbeddingBias, {"embedding_bias": [0.5] * 41}, "embedding_bias has 41 numbers for 40 tokens"),
        (BadWords, {"bad_words_list": [[1, 41]]}, "not in the vocabulary of 40"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(make, wish, words, new_floor):
    floor = new_floor()
    plugin = make()
    plugin.setup(floor.context)
    with pytest.raises(ConfigError, match=words):
        plugin.begin(0, floor.view(0, [1], **wish))


def test_tables_change_their_graph_key_when_they_grow(new_floor):
    floor = new_floor()
    plugin = BadWords()
    plugin.setup(floor.context)
    plugin.begin(0, floor.view(0, [1], bad_words_list=[[1]]))
    small = plugin.graph_key
    plugin.begin(1, floor.view(1, [1], bad_words_list=[[1, 2, 3], [2], [3]]))
    assert plugin.graph_key != small
    plugin.begin(0, floor.view(0, [1], bad_words_list=[[1]] * 4))
    assert plugin.graph_key == (4, 4)


def test_prompt_ids_above_the_vocabulary_count_for_nothing(new_floor, reference):
    """Prompt tuning writes them into the prompt."""
    floor = new_floor()
    plugin = Penalties()
    plugin.setup(floor.context)
    plugin.begin(0, floor.view(0, [1000, 1, 43, 44], repetition_penalty=2.0))
    raw = np.ones(44, np.float32)
    logits = torch.from_numpy(raw.copy())[None]
    plugin.apply(logits, floor.logits_batch([0]))
    compare(logits, [reference.penalties(raw, [1, 43], 2.0, 0, 0)])


@st.composite
def histories(draw):
    """A list of things that can happen to four branches."""
    token = st.integers(0, 7)
    event = st.one_of(
        st.tuples(
            st.just("commit"), st.permutations(range(4)), st.lists(st.lists(token, max_size=3), min_size=4, max_size=4)
        ),
        st.tuples(st.just("rewind"), st.integers(0, 3), st.integers(0, 4)),
        st.tuples(st.just("fork"), st.lists(st.integers(0, 3), min_size=4, max_size=4), st.permutations(range(4))),
    )
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=4, max_size=4))
    return prompts, draw(st.integers(0, 3)), draw(st.lists(event, max_size=12))


@given(histories())
@settings(max_examples=150, deadline=None)
def test_penalties_follow_any_history(new_floor, reference, history):
    prompts, ignored, events = history
    floor = new_floor(slots=4, vocab=8, padded=8, max_seq_len=64)
    plugin = Penalties()
    plugin.setup(floor.context)
    start = []
    for slot, prompt in enumerate(prompts):
        view = floor.view(slot, prompt, presence_penalty=0.5, frequency_penalty=0.25, prompt_ignore_length=ignored)
        plugin.begin(slot, view)
        start.append((len(prompt), min(ignored, len(prompt))))
    for kind, first, second in events:
        if kind == "commit":
            commit(floor, plugin, first, second)
        elif kind == "rewind":
            n = min(second, len(floor.histories[first]) - start[first][0])
            floor.rewind(first, n)
            plugin.rewind(first, n)
        else:
            floor.fork(first, second)
            plugin.fork(torch.tensor(first), torch.tensor(second))
            copied = [start[slot] for slot in first]
            for slot, value in zip(second, copied, strict=True):
                start[slot] = value
    logits = torch.zeros(4, 8)
    plugin.apply(logits, floor.logits_batch([0, 1, 2, 3]))
    zeros = np.zeros(8, np.float32)
    counted = [floor.histories[slot][start[slot][1] :] for slot in range(4)]
    compare(logits, [reference.penalties(zeros, ids, 1.0, 0.5, 0.25) for ids in counted])
