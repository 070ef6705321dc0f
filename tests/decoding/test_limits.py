"""Criteria that are asked for by name or by a limit: time, confidence, repetition. Each against a plain reference."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core import ModelRunner, SamplingConfig, use
from trtllm_core.decoding.confidence import Confidence
from trtllm_core.decoding.repetition import Repetition
from trtllm_core.decoding.time_limit import MaxTime
from trtllm_core.errors import ConfigError
from trtllm_core.generation import GenerationSession
from trtllm_core.session import Session
from trtllm_core.testing.markov import MarkovExecutable

CONFIG = SamplingConfig(end_id=(), max_new_tokens=8, return_dict=True)


def begun(criterion, floor, slots, params=None, **sampling):
    criterion.setup(floor.context)
    for slot, prompt in slots.items():
        view = floor.view(slot, prompt, **sampling)
        criterion.begin(slot, dataclasses.replace(view, params=(params or {}).get(slot)))
    return criterion


# -- time ------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still, or moves by the same step whenever it is read."""

    def __init__(self, step=0.0):
        self.now, self.step = 100.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def test_max_time_is_read_once_a_step_and_ends_whole_requests(new_floor):
    floor, clock = new_floor(), Clock()
    floor.context = dataclasses.replace(floor.context, clock=clock)
    criterion = begun(MaxTime(), floor, {0: [1], 1: [1]}, max_time=2.0)
    clock.now += 1.0
    criterion.begin(2, floor.view(2, [1], max_time=5.0))
    clock.now += 0.5
    batch = floor.commit_batch([0, 1, 2, 1], [[3], [3, 3], [3], [3]], active=[True, True, True, False])
    assert criterion.check(batch).tolist() == [-1] * 4
    clock.now += 0.5
    assert criterion.check(batch).tolist() == [0, 1, -1, -1], "what the step chose stays"
    criterion.fork(torch.tensor([2, 0]), torch.tensor([0, 2]))
    assert criterion.check(batch).tolist() == [-1, 1, 0, -1]
    criterion.rewind(1, 1)
    assert criterion.check(floor.commit_batch([1], [[]])).tolist() == [-1]
    clock.now += 4.0
    assert criterion.check(batch).tolist() == [0, 1, 0, -1]
    assert (criterion.scope, criterion.reason) == ("request", "timed_out")


def test_a_session_takes_a_clock_of_the_tests():
    clock = Clock(step=1.0)  # read when a request begins, and once a step
    engine = MarkovExecutable()
    with GenerationSession(None, Session.from_engine(engine), clock=clock) as session:
        configs = [CONFIG.replace(max_time=3.5), CONFIG]
        outputs = session.decode_batch([[5], [6]], configs)["outputs"]
        assert [(o.finish_reason, len(o.tokens)) for o in outputs] == [("timed_out", 4), ("length", 8)]
        # One begins, the other begins, then a reading for each of the four steps: nobody reads it without a limit.
        assert clock.now == 100.0 + 1 + 4
        session.decode_batch([[5]], CONFIG)
        assert clock.now == 105.0


def test_the_clock_is_that_of_the_first_rank():
    engine = MarkovExecutable()
    # What another rank would say, whatever this one's clock shows; seeds are told as well.
    engine.broadcast = lambda value: 7.0 if isinstance(value, float) else value
    with GenerationSession(None, Session.from_engine(engine), clock=Clock(step=1e9)) as session:
        assert session.loop.branches.slots.context.clock() == 7.0
        output = session.decode_batch([[5]], CONFIG.replace(max_time=0.5))["outputs"][0]
        assert output.finish_reason == "length"


# -- confidence ------------------------------------------------------------------------------------------------------


def measured(row, token, measure):
    p = np.exp(row - row.max())
    p /= p.sum()
    if measure == "probability":
        return p[token]
    return -sum(x * math.log(x) for x in p if x > 0)


def reference_stop(values, above, below, steps):
    """Index of the value that ends the first ``steps`` in a row past the bound, or None."""
    run = 0
    for i, value in enumerate(values):
        run = run + 1 if (value >= above if below is None else value <= below) else 0
        if run >= steps:
            return i
    return None


@given(
    st.integers(0, 2**31),
    st.sampled_from(["probability", "entropy"]),
    st.booleans(),
    st.floats(0.05, 0.95),
    st.integers(1, 3),
    st.lists(st.integers(1, 3), min_size=1, max_size=6),
)
@settings(max_examples=120, deadline=None)
def test_confidence_against_a_plain_count(new_floor, seed, measure, above, share, steps, sizes):
    """Two rows with parameters of their own, tokens in steps of any size, the logits shuffled."""
    rng = np.random.default_rng(seed)
    floor = new_floor(vocab=6, padded=8)
    bound = share if measure == "probability" else share * math.log(6)
    one = Confidence.Params(measure=measure, steps=steps, **{"above" if above else "below": bound})
    never = Confidence.Params(above=2.0)
    criterion = begun(Confidence(), floor, {1: [1, 2], 4: [3]}, {1: one, 4: never})
    values, done = [], 0
    for size in sizes:
        rows = rng.normal(size=(2 * size, 8)).astype(np.float32) * 3
        rows[:, 6:] = -np.inf
        new = [rng.integers(0, 6, size).tolist() for _ in range(2)]
        source = rng.permutation(2 * size).reshape(2, size)
        values += [measured(rows[i].astype(float), token, measure) for i, token in zip(source[1], new[1], strict=True)]
        if any(abs(value - bound) < 1e-4 for value in values):
            return  # too close for float32 to agree with
        batch = floor.commit_batch([4, 1], new, logits=torch.from_numpy(rows), source=source.tolist())
        stop = reference_stop(values, bound if above else None, None if above else bound, steps)
        want = -1 if stop is None else stop - done
        assert criterion.check(batch).tolist() == [-1, want]
        if stop is not None:
            return
        for slot, tokens in zip([4, 1], new, strict=True):
            floor.append(slot, tokens)
        criterion.commit(batch)
        done += size


def test_confidence_forgets_what_was_taken_back_and_copies_what_was_forked(new_floor):
    floor = new_floor(vocab=4, padded=4)
    params = Confidence.Params(above=0.9, steps=3)
    criterion = begun(Confidence(), floor, {0: [1], 1: [1], 2: [1]}, dict.fromkeys(range(3), params))
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 0]])  # sure, and not

    def step(slots, sure):
        batch = floor.commit_batch(slots, [[0]] * len(slots), logits=logits, source=[[int(not s)] for s in sure])
        at = criterion.check(batch).tolist()
        for slot in slots:
            floor.append(slot, [0])
        criterion.commit(batch)
        return at

    assert step([0, 1, 2], [True, False, True]) == [-1, -1, -1]
    assert step([0, 1, 2], [True, True, False]) == [-1, -1, -1]
    # Tokens in a row: 2, 1, 0.
    for src, dst in (([0, 1, 2], [1, 2, 0]), ([0, 2], [2, 0])):
        floor.fork(src, dst)
        criterion.fork(torch.tensor(src), torch.tensor(dst))
    # Now 1, 2, 0.
    assert step([0, 1, 2], [True] * 3) == [-1, 0, -1]
    floor.rewind(1, 2)
    criterion.rewind(1, 2)
    assert step([1], [True]) == [-1]
    assert step([1], [True]) == [0]


def test_confidence_in_a_session_and_what_is_refused():
    table = torch.zeros(97, 97)
    table[5, 6] = table[6, 7] = 9.0  # sure of two tokens, and then of none
    runner = ModelRunner.from_engine(MarkovExecutable(table=table))
    config = CONFIG.replace(stopping_criteria=use("confidence", below=0.5, steps=2))
    output = runner.generate([[5]], config)["outputs"][0]
    assert (output.finish_reason, output.tokens) == ("confidence", (6, 7, 0, 0))
    for wrong in ({}, {"above": 1.0, "below": 0.1}, {"above": 0.5, "steps": 0}, {"above": 0.5, "measure": "mood"}):
        with pytest.raises(ConfigError, match="'confidence': [^\n]*$"):
            runner.generate([[5]], CONFIG.replace(stopping_criteria=use("confidence", **wrong)))


# -- repetition ------------------------------------------------------------------------------------------------------


def circle_at(generated, new, params):
    """Index of the first new token after which the generated text ends with enough copies of a pattern, or -1."""
    text = list(generated)
    for at, token in enumerate(new):
        text.append(token)
        for size in range(params.min_size, params.max_size + 1):
            tail = text[len(text) - size * params.count :] if len(text) >= size * params.count else None
            if tail is not None and tail == tail[:size] * params.count:
                return at
    return -1


sequences = st.lists(st.integers(0, 1), max_size=12)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=4), sequences, sequences, st.integers(1, 3),
            st.integers(0, 3), st.integers(2, 4),
        ),
        min_size=1,
        max_size=4,
    )
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_repetition_against_a_plain_search(new_floor, rows):
    floor = new_floor()
    params = {
        slot: Repetition.Params(min_size=least, max_size=least + more, count=count)
        for slot, (*_, least, more, count) in enumerate(rows)
    }
    criterion = begun(Repetition(), floor, {slot: row[0] for slot, row in enumerate(rows)}, params)
    for slot, row in enumerate(rows):
        floor.append(slot, row[1])
    got = criterion.check(floor.commit_batch(range(len(rows)), [row[2] for row in rows])).tolist()
    assert got == [circle_at(row[1], row[2], params[slot]) for slot, row in enumerate(rows)]
    cycle = [*range(1, len(rows)), 0]
    for slot in cycle:
        floor.rewind(slot, len(rows[slot][1]) // 2)
    floor.fork(cycle, range(len(rows)))
    criterion.fork(torch.tensor(cycle), torch.arange(len(rows)))
    got = criterion.check(floor.commit_batch(range(len(rows)), [row[2] for row in rows])).tolist()
    left = [floor.histories[slot][len(rows[src][0]) :] for slot, src in enumerate(cycle)]
    assert got == [circle_at(left[slot], rows[slot][2], params[src]) for slot, src in enumerate(cycle)]


def test_repetition_in_a_session():
    table = torch.zeros(97, 97)
    for a, b in ((1, 2), (2, 3), (3, 4), (4, 2)):
        table[a, b] = 9.0
    runner = ModelRunner.from_engine(MarkovExecutable(table=table))
    config = CONFIG.replace(max_new_tokens=40, stopping_criteria=use("repetition", min_size=2, max_size=5, count=3))
    output = runner.generate([[1]], config)["outputs"][0]
    assert (output.finish_reason, output.tokens) == ("repetition", (2, 3, 4) * 3)
    assert output.length == 1 + 9
    with pytest.raises(ConfigError, match="min_size must be at most max_size"):
        runner.generate([[1]], CONFIG.replace(stopping_criteria=use("repetition", min_size=9, max_size=5)))
