"""Log-probabilities in results and in streams: of the chosen tokens, and of the likeliest beside them."""

from __future__ import annotations

import math

import pytest
import torch

from trtllm_core import ModelRunner, Plugins, SamplingConfig
from trtllm_core.decoding.scoring import scored
from trtllm_core.errors import ConfigError
from trtllm_core.testing.markov import MarkovExecutable

BASE = SamplingConfig(top_k=0, top_p=0.9, temperature=0.7, random_seed=4, end_id=(), max_new_tokens=6, return_dict=True)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(), plugins=Plugins.load())


def expected(runner, prompt, tokens, temperature=0.7 + 1e-6):
    last = [prompt[-1], *tokens[:-1]]
    return (runner.session.engine.table[last] / temperature).log_softmax(1)


def test_the_likeliest_beside_each_token(runner):
    configs = [BASE.replace(num_logprobs=n, random_seed=n) for n in (3, 0, 5)]
    result = runner.generate([[5], [6], [7]], configs)
    for n, prompt, out in zip((3, 0, 5), ([5], [6], [7]), result["outputs"], strict=True):
        if not n:
            assert out.top_log_probs == out.log_probs == ()
            continue
        table = expected(runner, prompt, out.tokens)
        for row, token, log_prob, beside in zip(table, out.tokens, out.log_probs, out.top_log_probs, strict=True):
            best = row.topk(n)
            assert list(beside) == best.indices.tolist()
            assert list(beside.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
            assert log_prob == pytest.approx(float(row[token]), abs=1e-5)
            assert beside.get(token, log_prob) == pytest.approx(log_prob, abs=1e-6)
    assert result["top_log_probs"][2][0] == result["outputs"][2].top_log_probs


@pytest.mark.parametrize("sequences", [1, 3])
def test_streams_tell_what_results_hold(runner, sequences):
    config = BASE.replace(num_logprobs=2, output_cum_log_probs=True, num_return_sequences=sequences)
    outputs = runner.generate([[5]], config)["outputs"]
    told = {number: ([], [], []) for number in range(sequences)}
    for delta in runner.generate([[5]], config, streaming=True):
        for kept, new in zip(told[delta.sequence], (delta.tokens, delta.log_probs, delta.top_log_probs), strict=True):
            kept.extend(new)
    for out in outputs:
        assert told[out.sequence] == (list(out.tokens), list(out.log_probs), list(out.top_log_probs))
        assert out.cum_log_prob == pytest.approx(sum(out.log_probs), abs=1e-5)


def test_log_probs_are_of_the_whole_vocabulary_in_the_classic_preset_alone(runner):
    """Whatever truncates does not show in them; in transformers' preset it does."""
    classic, hf = (
        runner.generate([[5]], BASE.replace(preset=name, min_p=0.2, top_k=3, output_log_probs=True))["outputs"][0]
        for name in ("trtllm", "hf")
    )
    table = expected(runner, [5], classic.tokens)
    chosen = table[range(6), list(classic.tokens)]
    assert classic.log_probs == pytest.approx(chosen.tolist(), abs=1e-5)
    full = expected(runner, [5], hf.tokens, 0.7)[0]
    assert hf.log_probs[0] > float(full[hf.tokens[0]]) + 0.01


def test_normalised_among_the_top_k(runner):
    config = BASE.replace(top_k=4, top_p=0.0, normalize_log_probs=True, output_log_probs=True)
    out, plain = runner.generate([[5], [5]], [config, config.replace(normalize_log_probs=False)])["outputs"]
    assert out.tokens == plain.tokens
    table = expected(runner, [5], out.tokens)
    total = table.topk(4).values.logsumexp(1)
    want = [x - t for x, t in zip(plain.log_probs, total.tolist(), strict=True)]
    assert out.log_probs == pytest.approx(want, abs=1e-5)
    assert runner.generate([[5]], config.replace(top_k=1))["outputs"][0].log_probs == (0.0,) * 6


def test_scored_rows_do_not_mix():
    x, tokens = torch.randn(3, 20), torch.tensor([[1], [2], [3]])
    samplings = [SamplingConfig(top_k=k, normalize_log_probs=on) for k, on in ((2, True), (9, False), (0, True))]
    together = scored(x, tokens, samplings)
    for i in range(3):
        assert torch.equal(together[i], scored(x[i : i + 1], tokens[i : i + 1], samplings[i : i + 1])[0])
    assert math.isclose(float(together[1]), float(x[1].log_softmax(0)[2]), abs_tol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_logprobs": 2, "return_dict": False}, "'num_logprobs': a tensor of token ids has no place for it"),
    ],
)
def test_refused(runner, fields, words):
    with pytest.raises(ConfigError, match=words):
        runner.generate([[5]], BASE.replace(**fields))
