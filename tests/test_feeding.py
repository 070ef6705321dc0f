"""What the engine is given: the same tensors by the road of steady steps and by that of all others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import host_cost
from trtllm_core import ModelRunner, Plugins
from trtllm_core.feeding import Rows
from trtllm_core.testing.markov import MarkovExecutable


@pytest.fixture
def loop():
    runner = ModelRunner.from_engine(MarkovExecutable(), plugins=Plugins.load())
    stream = runner.generate([[5, 6, 7], [11], [3] * 20, [9, 8]], end_id=(), max_new_tokens=9, streaming=True)
    for _ in range(3 * 4):
        next(stream)
    yield runner.generation.loop
    stream.close()


def copied(fed):
    return {name: tensor.clone() for name, tensor in fed.inputs.items()}


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [2, 0], [3]])
def test_both_roads_say_the_same(loop, slots):
    rows, ones = np.array(slots), np.ones(len(slots), np.int64)
    loop.reserve(slots, ones)
    steady = loop._feed.fill(Rows(rows, ones, ones > 0, steady=True))
    here = copied(steady)
    there = loop._feed.fill(Rows(rows, ones, ones > 0))
    assert here.keys() == there.inputs.keys()
    for name, tensor in there.inputs.items():
        assert (tensor.dtype, tensor.tolist()) == (here[name].dtype, here[name].tolist()), name
    assert steady.given == there.given == len(slots)
    assert here["input_ids"].tolist() == [loop.branches.slots.history(slot)[-1] for slot in slots]
    assert (here["past_lengths"] + 1).tolist() == loop.branches.slots.lengths[rows].tolist()


def test_steady_steps_allocate_no_inputs(loop):
    rows, ones = np.arange(4), np.ones(4, np.int64)
    first, second = (loop._feed.fill(Rows(rows, ones, ones > 0, steady=True)) for _ in range(2))
    assert first.inputs is second.inputs


def test_more_tokens_than_a_step_should_run_make_the_buffers_grow(loop):
    branches = loop.branches
    count = loop.session.config.build.max_num_tokens + 5
    branches.slots.tokens = np.arange(4 * count, dtype=np.int32).reshape(4, count)
    loop.cache.cached[:] = 0
    fed = loop._feed.fill(Rows(np.array([1]), np.array([count]), np.array([True])))
    assert torch.equal(fed.inputs["input_ids"], torch.arange(count, 2 * count, dtype=torch.int32))
    assert fed.inputs["logits_indices"].tolist() == [count - 1]


def test_the_script_that_measures_the_host():
    taken = host_cost.steps_of(2, "sampled", None)
    assert len(taken) == host_cost.NEW - 2
    assert 0 < min(taken) < 1
