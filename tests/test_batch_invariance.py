"""The same request gives the same tokens alone, in a batch of 64, in another row, and after giving its cache back."""

from __future__ import annotations

import random

import pytest

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(
    max_batch_size=64, max_input_len=40, max_seq_len=64, max_num_tokens=256, tokens_per_block=8
)  # fmt: skip
BASE = SamplingConfig(
    top_k=0, top_p=1.0, end_id=(), max_new_tokens=10, output_log_probs=True, num_logprobs=2, return_dict=True
)
WISHES = {
    "greedy": {"top_k": 1},
    "penalties": {"top_k": 1, "repetition_penalty": 1.3, "frequency_penalty": 0.3, "no_repeat_ngram_size": 2},
    "multinomial": {"temperature": 0.8},
    "top_k": {"top_k": 7, "top_p": 0.0},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
    "top_k_top_p": {"top_k": 20, "top_p": 0.7},
    "decay": {"top_p": 0.9, "top_p_decay": 0.8, "top_p_min": 0.2, "top_p_reset_ids": 3},
    "min_p": {"min_p": 0.1},
    "typical": {"typical_p": 0.8},
    "mirostat": {"decoder": use("mirostat", tau=3.0, eta=0.5)},
    "hf": {"preset": "hf", "top_k": 30, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.2},
    "hf_cutoffs": {"preset": "hf", "epsilon_cutoff": 0.005, "eta_cutoff": 0.01, "typical_p": 0.9},
}
ASKED = [BASE.replace(random_seed=100 + i, **wish) for i, wish in enumerate(WISHES.values())]
PROMPTS = [[5, 6, 7], [11] * 20, [9, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42, 17], [3] * 31]


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> ModelRunner:
    folder, plugins = tmp_path_factory.mktemp("invariant"), Plugins.load()
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS, plugins=plugins)
    return ModelRunner.from_dir(folder / "engine", plugins=plugins, batch_invariant=True)


@pytest.fixture(scope="module")
def alone(runner):
    """Each request by itself."""
    return [told(runner.generate([prompt_of(i)], config)["outputs"][0]) for i, config in enumerate(ASKED)]


def prompt_of(i):
    return PROMPTS[i % len(PROMPTS)]


def told(output):
    return output.tokens, output.log_probs, output.top_log_probs


@pytest.mark.parametrize("seed", [0, 1])
def test_among_63_others_in_any_row(runner, alone, seed):
    rng = random.Random(seed)
    rows = rng.sample(range(64), len(ASKED))
    prompts = [[rng.randrange(60) for _ in range(rng.randrange(1, 40))] for _ in range(64)]
    configs = [rng.choice(ASKED).replace(random_seed=i, max_new_tokens=rng.randrange(1, 14)) for i in range(64)]
    for i, row in enumerate(rows):
        prompts[row], configs[row] = prompt_of(i), ASKED[i]
    outputs = runner.generate(prompts, configs)["outputs"]
    for name, row, want in zip(WISHES, rows, alone, strict=True):
        assert told(outputs[row]) == want, name


def test_after_giving_its_cache_back(runner, alone, monkeypatch):
    """Every request is preempted twice, and resumed a step later."""
    reserve = Scheduler._reserve
    steps = iter(range(10_000))

    def disturb(self):
        step = next(steps)
        for number, one in enumerate([*self._running]):
            if (step + number) % 5 == 4 and len(self._running) > 1:
                self._running.leave(one)
                self._put_off(one)
        self._room.forget()  # as if something had been given back
        return reserve(self)

    monkeypatch.setattr(Scheduler, "_reserve", disturb)
    outputs = runner.generate([prompt_of(i) for i in range(len(ASKED))], ASKED)["outputs"]
    assert [told(one) for one in outputs] == alone
    assert min(one.preemptions for one in outputs) >= 2


def test_one_seed_is_one_stream_and_the_row_no_part_of_it(runner):
    """The classic top-p kernel drew by the place in the batch: equal requests differed, and so did moved ones."""
    config = BASE.replace(top_p=0.9, random_seed=7)
    first, second = runner.generate([[5, 6], [5, 6]], config)["outputs"]
    assert told(first) == told(second)
    other = runner.generate([[5, 6], [5, 6]], [config, config.replace(random_seed=8)])["outputs"]
    assert told(other[0]) == told(first)
    assert other[1].tokens != first.tokens
