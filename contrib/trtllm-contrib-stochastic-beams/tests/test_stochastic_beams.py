"""The search through the kit, and what its samples are distributed like."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from trtllm_contrib_stochastic_beams import plugin
from trtllm_contrib_stochastic_beams.estimate import weights
from trtllm_contrib_stochastic_beams.search import conditioned
from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig
from trtllm_core.errors import ConfigError
from trtllm_core.testing import DecoderConformance
from trtllm_core.testing.markov import MarkovExecutable

VOCAB, LENGTH, K, RUNS = 4, 3, 3, 400


class TestSearch(DecoderConformance):
    plugin = plugin
    sampling = ({"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2}, {"num_beams": 4})


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    build = BuildConfig(max_batch_size=16, max_beam_width=K, max_input_len=7, max_seq_len=12, tokens_per_block=4)
    engine = MarkovExecutable(VOCAB, seed=2, build=build, table=torch.randn(VOCAB, VOCAB, generator=seeded(2)))
    return ModelRunner.from_engine(engine, plugins=Plugins.load(extra=[plugin]))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def samples(runner: ModelRunner) -> list[list]:
    """Sequences of many requests: token 3 ends one, and there are three tokens at most."""
    base = SamplingConfig(
        decoder="stochastic_beam_search",
        num_beams=K,
        num_return_sequences=K,
        max_new_tokens=LENGTH,
        end_id=3,
        min_length=0,
        return_dict=True,
    )
    found = []
    for first in range(0, RUNS, 16):
        requests = [base.replace(random_seed=seed) for seed in range(first, first + 16)]
        outputs = runner.generate([[0]] * 16, requests)["outputs"]
        found += [outputs[i : i + K] for i in range(0, len(outputs), K)]
    return found


@pytest.fixture(scope="module")
def chances(runner: ModelRunner) -> dict[tuple[int, ...], float]:
    """Every sequence that there is, and its probability."""
    table = runner.session.engine.table.double().softmax(1)
    found = {}
    for length in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            if 3 in tokens[:-1] or (length < LENGTH and tokens[-1] != 3):
                continue
            steps = zip((0, *tokens), tokens, strict=False)
            found[tokens] = float(torch.tensor([float(table[a, b]) for a, b in steps]).double().prod())
    assert sum(found.values()) == pytest.approx(1)
    return found


def test_no_sequence_comes_twice(samples: list[list]) -> None:
    for outputs in samples:
        assert len({output.tokens for output in outputs}) == K


def test_log_probabilities_are_the_sequences_own(samples: list[list], chances: dict) -> None:
    for output in itertools.chain(*samples[:50]):
        assert output.cum_log_prob == pytest.approx(float(torch.tensor(chances[output.tokens]).log()), abs=1e-4)


def test_the_first_is_a_sample(samples: list[list], chances: dict) -> None:
    counts = Counter(outputs[0].tokens for outputs in samples)
    common = {tokens: p for tokens, p in chances.items() if p * RUNS > 5}
    chi = sum((counts[tokens] - p * RUNS) ** 2 / (p * RUNS) for tokens, p in common.items())
    assert chi < 2 * len(common) + 10


def test_the_second_is_a_sample_of_the_rest(samples: list[list], chances: dict) -> None:
    """Without replacement: given the first, the second has the probabilities of what is left."""
    due: Counter = Counter()
    for outputs in samples:
        first = outputs[0].tokens
        for tokens, p in chances.items():
            due[tokens] += 0 if tokens == first else p / (1 - chances[first])
    counts = Counter(outputs[1].tokens for outputs in samples)
    common = [tokens for tokens in chances if due[tokens] > 5]
    chi = sum((counts[tokens] - due[tokens]) ** 2 / due[tokens] for tokens in common)
    assert chi < 2 * len(common) + 10


def test_estimates_are_unbiased(samples: list[list], chances: dict) -> None:
    """The mean length, estimated from the first k − 1 sequences of each request."""
    exact = sum(p * len(tokens) for tokens, p in chances.items())
    estimates = []
    for outputs in samples:
        shares = weights([output.cum_log_prob for output in outputs], [output.score for output in outputs])
        estimates.append(sum(w * len(o.tokens) for w, o in zip(shares, outputs, strict=False)))
    mean = torch.tensor(estimates)
    assert abs(float(mean.mean()) - exact) < 4 * float(mean.std()) / len(estimates) ** 0.5


def test_conditioned_numbers_have_the_maximum_that_is_given() -> None:
    g = -torch.log(-torch.log(torch.rand(5, 40, generator=seeded(0), dtype=torch.float64)))
    most = torch.tensor([[-3.0], [0.0], [2.0], [9.0], [-20.0]], dtype=torch.float64)
    found = conditioned(g, most)
    plain = -torch.log(torch.exp(-most) - torch.exp(-g.amax(1, keepdim=True)) + torch.exp(-g))
    assert torch.allclose(found.amax(1, keepdim=True), most)
    assert torch.allclose(found, plain)


def test_more_sequences_than_beams_are_refused(runner: ModelRunner) -> None:
    with pytest.raises(ConfigError, match="at most 2"):
        runner.generate([[0]], decoder="stochastic_beam_search", num_beams=2, num_return_sequences=3, max_new_tokens=2)
