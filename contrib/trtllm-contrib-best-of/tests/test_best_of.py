"""Best of n through the kit, and with scorers of which the result is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from trtllm_contrib_best_of import plugin
from trtllm_contrib_best_of.decoder import BestOf
from trtllm_contrib_best_of.scorers import consensus
from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import DecoderRegistrar, Hypothesis, hookimpl
from trtllm_core.testing import DecoderConformance
from trtllm_core.testing.markov import MarkovExecutable


class TestBestOf(DecoderConformance):
    plugin = plugin
    params = ({"n": 3}, {"n": 2})
    sampling = ({}, {"num_return_sequences": 2})
    wrong_params = ({"n": 0}, {"scorer": "no such scorer"})


def sums(prompt: Sequence[int], answers: Sequence[Hypothesis]) -> list[float]:
    return [float(sum(answer.tokens)) for answer in answers]


def fails(prompt: Sequence[int], answers: Sequence[Hypothesis]) -> list[float]:
    return [1.0]


class Mine:
    hook_api = "decoder>=1.1,<2"

    @hookimpl
    def trtllm_register_decoders(self, registrar: DecoderRegistrar) -> None:
        for scorer in (sums, fails):
            registrar.add(scorer.__name__, lambda scorer=scorer: BestOf(scorer), consumes=plugin_fields)


plugin_fields = ("num_return_sequences", "random_seed")


def run(engine: MarkovExecutable, **fields: object) -> list:
    runner = ModelRunner.from_engine(engine, plugins=Plugins.load(extra=[plugin, Mine()]))
    base = SamplingConfig(max_new_tokens=6, end_id=(), random_seed=3, return_dict=True)
    return runner.generate([[5]], base.replace(**fields))["outputs"]


def test_the_best_by_a_scorer_of_ones_own() -> None:
    everything = run(MarkovExecutable(), decoder=use("sums", n=8), num_return_sequences=8)
    totals = [sum(output.tokens) for output in everything]
    assert len(set(totals)) > 4, "the branches draw for themselves"
    assert totals == sorted(totals, reverse=True) == [output.score for output in everything]
    (best,) = run(MarkovExecutable(), decoder=use("sums", n=8))
    assert best.tokens == everything[0].tokens


def test_consensus_is_the_most_frequent_answer() -> None:
    table = torch.full((97, 97), -30.0)
    table[5, 6], table[5, 7] = 0.0, -1.0  # 73 % and 27 %
    table[6, 6] = table[7, 7] = 0.0
    outputs = run(MarkovExecutable(table=table), decoder=use("best_of", n=8), num_return_sequences=8)
    firsts = [output.tokens[0] for output in outputs]
    assert len(set(firsts)) == 2
    assert outputs[0].tokens == (firsts[0],) * 6
    assert outputs[0].score == firsts.count(firsts[0]) == max(map(firsts.count, firsts))


def test_texts_are_compared_where_there_are_some() -> None:
    answers = [Hypothesis((1, 2), text=" yes"), Hypothesis((3,), text="yes "), Hypothesis((4,), text="no")]
    assert consensus((), answers) == [2, 2, 1]
    assert consensus((), [Hypothesis((1, 2)), Hypothesis((1, 2)), Hypothesis((2,))]) == [2, 2, 1]


def test_each_branch_is_a_sample_of_its_own() -> None:
    """The first answer of n is what the request alone would not be: draws depend on the branch, not on n."""
    eight = run(MarkovExecutable(), decoder=use("sums", n=8), num_return_sequences=8)
    four = run(MarkovExecutable(), decoder=use("sums", n=4), num_return_sequences=4)
    assert {output.tokens for output in four} < {output.tokens for output in eight}


def test_a_scorer_that_is_wrong_fails_its_request() -> None:
    outputs = run(MarkovExecutable(), decoder=use("fails", n=3))
    assert outputs[0].finish_reason == "plugin_error"
    assert "1 scores for 3 answers" in str(outputs[0].error)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scorer 'none' is installed"):
        run(MarkovExecutable(), decoder=use("best_of", scorer="none"))
    with pytest.raises(ConfigError, match="num_return_sequences=5, but n=4"):
        run(MarkovExecutable(), decoder=use("best_of"), num_return_sequences=5)
