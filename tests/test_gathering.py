"""Gathered logits and log-probabilities of prompts: on a model whose logits are rows of a table, and on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trtllm_core import KVCacheConfig, ModelRunner, Plugins, SamplingConfig
from trtllm_core.config import BuildConfig
from trtllm_core.errors import ConfigError
from trtllm_core.testing.markov import MarkovExecutable

PROMPTS = [[5, 6, 7], [11], [3, 4] * 10, [9, 8]]
BUILD = BuildConfig(max_batch_size=8, max_input_len=100, max_seq_len=128, tokens_per_block=8)
BOTH = {"gather_context_logits": True, "gather_generation_logits": True}
CONFIG = SamplingConfig(end_id=(), max_new_tokens=6, return_dict=True, repetition_penalty=1.3)
"""With a processor: what is gathered is before it."""


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


def make(plugins: Plugins, kv: KVCacheConfig | None = None, **build: Any) -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(build=BUILD.replace(**build)), plugins=plugins, kv_cache=kv)


def rows(runner: ModelRunner, tokens: Any) -> torch.Tensor:
    """The logits after each token."""
    return runner.session.engine.table[list(tokens)]  # type: ignore[attr-defined,no-any-return]


def check(runner: ModelRunner, output: Any) -> None:
    assert torch.equal(output.context_logits, rows(runner, output.prompt))
    assert torch.equal(output.generation_logits, rows(runner, [output.prompt[-1], *output.tokens[:-1]]))


@pytest.mark.parametrize("build", [{}, {"max_num_tokens": 7, "max_batch_size": 4}])
def test_classic_shapes(plugins, build):
    """Prompts whole, and cut into chunks."""
    runner = make(plugins, **BOTH, **build)
    assert (runner.gather_context_logits, runner.gather_generation_logits) == (True, True)
    configs = [CONFIG.replace(max_new_tokens=n) for n in (6, 2, 4, 5)]
    result = runner.generate(PROMPTS, configs)
    assert [tuple(one.shape) for one in result["context_logits"]] == [(len(prompt), 97) for prompt in PROMPTS]
    assert result["generation_logits"].shape == (4, 1, 6, 97)
    for i, output in enumerate(result["outputs"]):
        check(runner, output)
        assert torch.equal(result["context_logits"][i], output.context_logits)
        count = len(output.tokens)
        assert torch.equal(result["generation_logits"][i, 0, :count], output.generation_logits)
        assert (result["generation_logits"][i, 0, count:] == 0).all()
    loop = runner.generation.loop
    assert loop._logits.shape[0] == runner.config.build.max_branches, "the step's buffer is no larger for it"


def test_only_where_the_engine_was_built_for_it(plugins):
    runner = make(plugins)
    assert (runner.gather_context_logits, runner.gather_generation_logits) == (False, False)
    result = runner.generate(PROMPTS, CONFIG)
    assert not {"context_logits", "generation_logits"} & result.keys()
    assert result["outputs"][0].context_logits is result["outputs"][0].generation_logits is None
    one = make(plugins, gather_context_logits=True).generate(PROMPTS, CONFIG)
    assert "context_logits" in one
    assert "generation_logits" not in one
    ids = make(plugins, **BOTH).generate(PROMPTS, CONFIG.replace(return_dict=False))
    assert torch.equal(ids, result["output_ids"]), "a tensor of ids has no place for logits: none are gathered"


def test_deltas_carry_their_own(plugins):
    runner = make(plugins, **BOTH, max_num_tokens=8)
    whole = runner.generate(PROMPTS, CONFIG)["outputs"]
    context: dict[int, torch.Tensor] = {}
    chosen: dict[int, list[torch.Tensor]] = {}
    for delta in runner.generate(PROMPTS, CONFIG.replace(return_dict=False), streaming=True):
        i = int(delta.request_id)
        assert (delta.context_logits is not None) == (i not in context)
        if delta.context_logits is not None:
            context[i] = delta.context_logits
        chosen.setdefault(i, []).append(delta.generation_logits)
    for i, output in enumerate(whole):
        assert torch.equal(context[i], output.context_logits)
        assert torch.equal(torch.cat(chosen[i]), output.generation_logits)
    last = list(runner.generate(PROMPTS, CONFIG, streaming=True, full=True))[-1]
    assert all(torch.equal(a, b.context_logits) for a, b in zip(last["context_logits"], whole, strict=True))


@pytest.mark.parametrize("fields", [{"num_return_sequences": 3}, {"num_beams": 3}])
def test_several_sequences(plugins, fields):
    """Logits follow the branches through forks, and each sequence has its own."""
    runner = make(plugins, **BOTH, max_beam_width=4)
    draws = {} if "num_beams" in fields else {"top_k": 0, "top_p": 1.0, "random_seed": 3}
    config = CONFIG.replace(**fields, **draws, max_new_tokens=8)
    result = runner.generate(PROMPTS[:2], config)
    assert result["generation_logits"].shape[:2] == result["output_ids"].shape[:2]
    assert len({output.tokens for output in result["outputs"]}) > 3
    for output in result["outputs"]:
        check(runner, output)
    told: dict[tuple[str, int], list[torch.Tensor]] = {}
    for delta in runner.generate(PROMPTS[:2], config, streaming=True):
        kept = told.setdefault((delta.request_id, delta.sequence), [])
        if delta.keep is not None:
            del kept[delta.keep :]
        kept += [] if delta.generation_logits is None else list(delta.generation_logits)
    for output in result["outputs"]:
        assert torch.equal(torch.stack(told[output.request_id, output.sequence]), output.generation_logits)


def test_cached_prefixes_have_no_logits(plugins):
    """A request that wants the prompt's logits computes all of it, and leaves nothing that others could hit."""
    runner = make(plugins, KVCacheConfig(policy="prefix"), gather_context_logits=True)
    plain = CONFIG.replace(return_dict=False)
    for config in (plain, CONFIG, CONFIG):
        result = runner.generate([PROMPTS[2]], config)
        if config is CONFIG:
            assert result["outputs"][0].cached_prompt_tokens == 0
            assert torch.equal(result["context_logits"][0], rows(runner, PROMPTS[2]))
    scored = make(plugins, KVCacheConfig(policy="prefix"))
    for _ in range(2):
        output = scored.generate([PROMPTS[2]], CONFIG.replace(prompt_logprobs=0))["outputs"][0]
        assert output.cached_prompt_tokens == 0
        assert len(output.prompt_log_probs) == 20
    assert scored.generate([PROMPTS[2]], CONFIG)["outputs"][0].cached_prompt_tokens == 0
    assert scored.generate([PROMPTS[2]], CONFIG)["outputs"][0].cached_prompt_tokens >= 16


@pytest.mark.parametrize("build", [{}, {"max_num_tokens": 7, "max_batch_size": 4}])
def test_log_probs_of_prompts(plugins, build):
    runner = make(plugins, **build)
    configs = [CONFIG.replace(prompt_logprobs=n) for n in (0, 1, 3)] + [CONFIG]
    result = runner.generate(PROMPTS, configs)
    for output, config in zip(result["outputs"], configs, strict=True):
        if config.prompt_logprobs is None:
            assert output.prompt_log_probs == output.prompt_top_log_probs == ()
            continue
        chances = rows(runner, output.prompt).log_softmax(-1)
        expected = [0.0] + [float(chances[i, token]) for i, token in enumerate(output.prompt[1:])]
        assert output.prompt_log_probs == pytest.approx(expected, abs=1e-5)
        if not config.prompt_logprobs:
            assert output.prompt_top_log_probs == ()
            continue
        assert output.prompt_top_log_probs[0] == {}
        for i, others in enumerate(output.prompt_top_log_probs[1:]):
            values, ids = chances[i].topk(config.prompt_logprobs)
            assert list(others) == ids.tolist()
            assert list(others.values()) == pytest.approx(values.tolist(), abs=1e-5)
    torch.testing.assert_close(result["prompt_log_probs"][2], torch.tensor(result["outputs"][2].prompt_log_probs))
    first = next(iter(runner.generate(PROMPTS[:1], configs[2], streaming=True)))
    assert (first.prompt_log_probs, first.prompt_top_log_probs) == (
        runner.generate(PROMPTS[:1], configs[2])["outputs"][0].prompt_log_probs,
        runner.generate(PROMPTS[:1], configs[2])["outputs"][0].prompt_top_log_probs,
    )


def test_a_tensor_has_no_place_for_log_probs_of_prompts(plugins):
    with pytest.raises(ConfigError, match="'prompt_logprobs': a tensor of token ids has no place for it"):
        make(plugins).generate([[5]], prompt_logprobs=0)


def test_drafts_have_logits_of_their_own(plugins):
    """A step that accepts several tokens keeps what each was chosen from."""
    table = torch.randn(97, 97, generator=torch.Generator().manual_seed(1))
    table[torch.arange(97), (torch.arange(97) + 1) % 7] += 20  # the text runs in a circle
    runner = ModelRunner.from_engine(MarkovExecutable(build=BUILD.replace(**BOTH), table=table), plugins=plugins)
    config = SamplingConfig(end_id=(), max_new_tokens=40, return_dict=True, decoder="ngram")
    outputs = runner.generate([[1, 2, 3], [5], [0, 9]], config)["outputs"]
    for output in outputs:
        check(runner, output)
    told = [d.tokens for d in runner.generate([[1, 2, 3]], config, streaming=True)]
    assert max(map(len, told)) > 1, "drafts were accepted"
