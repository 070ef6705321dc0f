"""Every decoder that is installed: the same request gives the same answer alone, in a batch of 64, in other rows and
slots, and after giving its cache back, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, Session, build_engine, use
from trtllm_core.outputs import GenerationOutput
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.checkpoints import write_llama

LIMITS = BuildConfig(
    max_batch_size=64, max_beam_width=4, max_input_len=40, max_seq_len=64, max_num_tokens=512, tokens_per_block=8
)
BASE = SamplingConfig(end_id=(9, 30), max_new_tokens=10, output_log_probs=True, return_dict=True)
DRAWN = {"top_k": 0, "top_p": 1.0}
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"top_k": 1},
    "top_k_top_p": {"top_k": 20, "top_p": 0.7},
    "multinomial": {"decoder": "multinomial", "temperature": 0.8},
    "mirostat": {**DRAWN, "decoder": use("mirostat", tau=3.0, eta=0.5)},
    "draft_model": {**DRAWN, "temperature": 0.7},
    "contrastive_search": {"decoder": use("contrastive_search", top_k=3)},
    "ngram": {**DRAWN, "decoder": use("ngram", tokens=3), "temperature": 0.4},
    "beam_search": {"num_beams": 3, "length_penalty": 0.7},
    "plain_beam_search": {"num_beams": 3, "use_beam_hyps": False},
    "hf_beam_search": {"num_beams": 4, "preset": "hf", "num_return_sequences": 2, "repetition_penalty": 1.2},
    "diverse_beam_search": {"num_beams": 4, "decoder": use("diverse_beam_search", groups=2)},
    "hf_beam_sample": {**DRAWN, "num_beams": 2, "preset": "hf", "temperature": 1.2},
    "best_of": {**DRAWN, "decoder": use("best_of", n=3)},
    "stochastic_beam_search": {"decoder": "stochastic_beam_search", "num_beams": 3},
}
SEEDLESS = ("contrastive_search",)
PROMPTS = [[5, 6, 7], [11] * 20, [9, 8], [1, 2, 3, 1, 2, 3, 1, 2], [42, 17], [3] * 31]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder, plugins = tmp_path_factory.mktemp("every"), Plugins.load()
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS, plugins=plugins)
    return ModelRunner.from_dir(folder / "engine", plugins=plugins, batch_invariant=True)


@pytest.fixture(scope="module")
def asked(runner: ModelRunner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SamplingConfig]:
    """One request for each decoder."""
    folder = tmp_path_factory.mktemp("draft")
    checkpoint = write_llama(folder / "hf", num_hidden_layers=1)
    build_engine(checkpoint, folder / "engine", LIMITS, plugins=runner.generation.loop.plugins)
    draft = Session.from_directory(folder / "engine", batch_invariant=True)
    wishes = WISHES | {"draft_model": WISHES["draft_model"] | {"decoder": use("draft_model", session=draft, tokens=3)}}
    seeds = {name: {} if name in SEEDLESS else {"random_seed": 100 + i} for i, name in enumerate(wishes)}
    return {name: BASE.replace(**wish, **seeds[name]) for name, wish in wishes.items()}


@pytest.fixture(scope="module")
def alone(runner: ModelRunner, asked: dict[str, SamplingConfig]) -> dict[str, list[Any]]:
    """Each request by itself."""
    return {
        name: told(runner.generate([prompt_of(i)], config)["outputs"]) for i, (name, config) in enumerate(asked.items())
    }


def prompt_of(number: int) -> list[int]:
    return PROMPTS[number % len(PROMPTS)]


def told(outputs: Sequence[GenerationOutput]) -> list[Any]:
    for one in outputs:
        assert one.error is None, one.error
    return [(one.tokens, one.finish_reason, one.log_probs, one.cum_log_prob, one.score) for one in outputs]


def by_request(outputs: Sequence[GenerationOutput]) -> dict[int, list[Any]]:
    found: dict[int, list[GenerationOutput]] = {}
    for one in outputs:
        found.setdefault(int(one.request_id), []).append(one)
    return {number: told(rows) for number, rows in found.items()}


def test_none_is_left_out(runner: ModelRunner, asked: dict[str, SamplingConfig]) -> None:
    assert {entry.name for entry in runner.generation.loop.plugins.decoders} == asked.keys()
    for name, config in asked.items():
        assert runner.explain(config).decoder.name == name


@pytest.mark.parametrize("seed", [0, 1])
def test_among_63_others_in_any_row(
    runner: ModelRunner, asked: dict[str, SamplingConfig], alone: dict[str, list[Any]], seed: int
) -> None:
    rng, names = random.Random(seed), list(asked)
    rows = rng.sample(range(64), len(names))
    prompts = [[rng.randrange(60) for _ in range(rng.randrange(1, 40))] for _ in range(64)]
    configs = [asked[rng.choice(names)].replace(max_new_tokens=rng.randrange(1, 14)) for _ in range(64)]
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        prompts[row], configs[row] = prompt_of(i), asked[name]
    found = by_request(runner.generate(prompts, configs)["outputs"])
    assert {name: found[row] for name, row in zip(names, rows, strict=True)} == alone


def test_after_giving_its_cache_back(
    runner: ModelRunner,
    asked: dict[str, SamplingConfig],
    alone: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between any two steps, again and again."""
    rng, reserve = random.Random(5), Scheduler._reserve

    def disturb(self: Any) -> Any:
        for one in [*self._running]:
            if len(self._running) > 1 and rng.random() < 0.4:
                self._running.leave(one)
                self._put_off(one)
        self._room.forget()  # as if something had been given back
        return reserve(self)

    monkeypatch.setattr(Scheduler, "_reserve", disturb)
    outputs = runner.generate([prompt_of(i) for i in range(len(asked))], list(asked.values()))["outputs"]
    found = by_request(outputs)
    assert {name: found[i] for i, name in enumerate(asked)} == alone
    preempted = {int(one.request_id): one.preemptions for one in outputs}
    names = list(asked)
    assert [names[i] for i, count in preempted.items() if not count] == []


def test_where_every_token_is_forbidden(runner: ModelRunner, asked: dict[str, SamplingConfig]) -> None:
    """The request ends with an error that says who chose nothing; others beside it do not."""
    forbidden = [[token] for token in range(67)]
    fine = BASE.replace(top_k=1)
    due = told(runner.generate([[4, 5]], fine)["outputs"])
    for name, config in asked.items():
        ask = config.replace(bad_words_list=forbidden)
        for prompts, configs in (([[5, 6]], [ask]), ([[5, 6], [4, 5]], [ask, fine])):
            outputs = runner.generate(prompts, configs)["outputs"]
            mine = [one for one in outputs if one.request_id == "0"]
            assert {one.finish_reason for one in mine} == {"plugin_error"}, name
            assert "found every token forbidden" in str(mine[0].error), mine[0].error
            assert told(outputs[len(mine) :]) in ([], due)
    loop = runner.generation.loop
    assert loop.cache.usage().free == loop.cache.usage().total
