"""The budget through the kit, and in whole texts."""

from __future__ import annotations

import pytest

from trtllm_contrib_thinking import plugin
from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import BranchView
from trtllm_core.testing import LogitsProcessorConformance
from trtllm_core.testing.markov import MarkovExecutable

MARKS = {"start": (3,), "end": (4,)}


class TestBudget(LogitsProcessorConformance):
    plugin = plugin
    params = (
        {**MARKS, "most": 3},
        {**MARKS, "most": 6, "least": 2},
        {"start": (1, 2), "end": (3, 4), "close": (5, 3, 4), "most": 2, "least": 1},
    )
    wrong_params = (
        {},
        {**MARKS, "most": -1},
        {**MARKS, "most": 2, "least": 3},
        {**MARKS, "most": 2, "close": (4, 5)},
        {"start": (), "end": (4,), "most": 1},
        {"start": (99,), "end": (4,), "most": 1},
    )


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(40, seed=1), plugins=Plugins.load(extra=[plugin]))


def texts(runner: ModelRunner, prompt: list[int], **params: object) -> list[list[int]]:
    """Eight random texts of 60 tokens after a prompt."""
    sampling = SamplingConfig(top_k=0, top_p=1.0, max_new_tokens=60, end_id=(), return_dict=True)
    requests = [
        sampling.replace(random_seed=seed, logits_processors=use("thinking_budget", **params)) for seed in range(8)
    ]
    outputs = runner.generate([prompt] * 8, requests)["outputs"]
    assert [output.error for output in outputs] == [None] * 8
    return [list(output.tokens) for output in outputs]


def thoughts(text: list[int], start: list[int], end: list[int]) -> list[list[int]]:
    """The tokens between each start and its end; those of a thought that is still open are left out."""
    found, at = [], 0
    while at <= len(text) - len(start):
        if text[at : at + len(start)] == start:
            begun = at + len(start)
            ends = (i for i in range(begun, len(text)) if text[begun : i + 1][-len(end) :] == end)
            last = next(ends, None)
            if last is None:
                break
            found.append(text[begun : last + 1])
            at = last + 1
        else:
            at += 1
    return found


def test_a_thought_ends_at_its_budget(runner: ModelRunner) -> None:
    for text in texts(runner, [5, 3], most=10, **MARKS):
        lengths = [len(thought) - 1 for thought in thoughts([3, *text], [3], [4])]
        assert lengths, "the prompt's thought was ended"
        assert max(lengths) <= 10


def test_no_budget_at_all_ends_it_at_once(runner: ModelRunner) -> None:
    assert {text[0] for text in texts(runner, [5, 3], most=0, **MARKS)} == {4}


def test_a_thought_is_kept_open(runner: ModelRunner) -> None:
    for text in texts(runner, [3], most=30, least=12, **MARKS):
        assert min(len(thought) - 1 for thought in thoughts([3, *text], [3], [4])) >= 12


def test_the_closing_words_are_forced(runner: ModelRunner) -> None:
    closing = [20, 21, 22, 4]
    for text in texts(runner, [3], most=5, close=tuple(closing), **MARKS):
        (first, *_) = thoughts([3, *text], [3], [4])
        assert first[-4:] == closing or len(first) <= 5
    long = [t for t in texts(runner, [3], most=5, close=tuple(closing), **MARKS) if t[5:9] == closing]
    assert long


def test_other_texts_are_free(runner: ModelRunner) -> None:
    sampling = SamplingConfig(top_k=0, top_p=1.0, max_new_tokens=30, end_id=(), random_seed=5)
    never = use("thinking_budget", start=(38, 39, 38), end=(4,), most=1)
    (free,) = runner.generate([[7]], sampling)[:, 0].tolist()
    (same,) = runner.generate([[7]], sampling.replace(logits_processors=never))[:, 0].tolist()
    assert free == same


def test_forced_tokens_are_told() -> None:
    from trtllm_contrib_thinking.budget import ThinkingBudget

    budget = ThinkingBudget()
    budget._vocab = 40
    params = ThinkingBudget.Params(start=(1,), end=(3, 4), close=(9, 3, 4), most=2)
    state = budget.start(BranchView("0", 0, 0, (1, 7), SamplingConfig(), (), 0, params))
    assert budget.forced(state) == ()
    assert budget.forced(budget.accept(state, [8])) == (9, 3, 4)
    assert budget.forced(budget.accept(state, [9])) == (3, 4)
    assert budget.forced(budget.accept(state, [3, 4])) == ()
    assert budget.forced(budget.take_back(state, 2)) == (3, 4)


def test_markers_outside_the_vocabulary_are_refused(runner: ModelRunner) -> None:
    with pytest.raises(ConfigError, match="not in the vocabulary of 40 tokens"):
        texts(runner, [3], start=(3,), end=(40,), most=1)
