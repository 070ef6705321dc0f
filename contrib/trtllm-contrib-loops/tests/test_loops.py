"""The criterion through the kit, and against a plain search."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from trtllm_contrib_loops import plugin
from trtllm_contrib_loops.criterion import Loop
from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.plugin import BranchView
from trtllm_core.testing import StoppingCriterionConformance
from trtllm_core.testing.markov import MarkovExecutable


class TestLoop(StoppingCriterionConformance):
    plugin = plugin
    params = ({"times": 2, "least": 2, "max_period": 5}, {"times": 2, "least": 4, "max_period": 3})
    wrong_params = ({"times": 1}, {"least": 0}, {"max_period": 0})


def reference(text: Sequence[int], params: Loop.Params) -> int | None:
    """The period of the loop that the text ends with, by trying all of them."""
    for period in range(1, params.max_period + 1):
        size = max(params.times * period, params.least)
        end = list(text[len(text) - size :]) if len(text) >= size else []
        if end and all(end[i] == end[i - period] for i in range(period, size)):
            return period
    return None


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_reference(seed: int) -> None:
    draw = random.Random(seed)
    params = Loop.Params(times=draw.randint(2, 4), least=draw.randint(1, 12), max_period=draw.choice([3, 8]))
    loop = Loop()
    view = BranchView("0", 0, 0, (1,), SamplingConfig(), (), 0, params)
    stopped = 0
    for _ in range(30):
        state, text = loop.start(view), []
        while len(text) < 60:
            new = [draw.randrange(3) for _ in range(draw.randint(1, 4))]
            if draw.random() < 0.5 and text:
                period = draw.randint(1, 6)
                new = (text[-period:] * 4)[: draw.randint(1, 9)]
            stop = loop.check(state, [1, *text], new)
            ends = [reference([*text, *new[: i + 1]], params) for i in range(len(new))]
            first = next((i for i, period in enumerate(ends) if period), None)
            assert (None if stop is None else stop.at) == first
            if stop is not None:
                assert stop.matched == tuple([*text, *new][: len(text) + stop.at + 1][-ends[first] :])
                stopped += 1
                break
            state = loop.accept(state, new)
            text += new
            if draw.random() < 0.2:
                n = draw.randint(1, len(text))
                state = loop.take_back(state, n)
                del text[len(text) - n :]
    assert stopped > 3


def test_a_long_loop_ends_a_text() -> None:
    table = torch.full((97, 97), -30.0)
    for token in range(97):
        table[token, (token + 1) % 40] = 0.0  # a loop of 40 tokens
    engine = MarkovExecutable(97, table=table)
    runner = ModelRunner.from_engine(engine, plugins=Plugins.load(extra=[plugin]))
    sampling = SamplingConfig(max_new_tokens=120, end_id=(), return_dict=True)
    asked = sampling.replace(stopping_criteria=use("loop", times=2))
    free, stopped = runner.generate([[0], [0]], [sampling, asked])["outputs"]
    assert free.finish_reason == "length"
    assert stopped.finish_reason == "loop"
    assert len(stopped.tokens) == 80
    assert stopped.matched == (*range(1, 40), 0)
