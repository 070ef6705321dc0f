"""The whole loop on a GPU gives the tokens that it gives on the CPU."""

from __future__ import annotations

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.decoding.fetching import Coming
from trtllm_core.decoding.request import Request
from trtllm_core.plugin import HostLogitsProcessor, HostStoppingCriterion, Stop
from trtllm_core.testing.checkpoints import write_llama

PROMPTS = [[5, 6, 7], [11], [3] * 20, [9, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42, 17]]
SAMPLED = {"top_k": 0, "top_p": 0.9, "temperature": 0.9, "repetition_penalty": 1.2, "random_seed": 3}
BASE = SamplingConfig(end_id=(), max_new_tokens=24, return_dict=True)


class NoRepeat(HostLogitsProcessor):
    """Masks the last token, in the mask-only form."""

    def mask(self, state, tokens, words):
        word, bit = divmod(tokens[-1], 32)
        words.view("uint32")[word] ^= 1 << bit
        return True


class At(HostStoppingCriterion):
    """Ends a sequence of 20 tokens."""

    def check(self, state, tokens, new):
        return Stop("twenty") if len(tokens) + len(new) == 20 else None


@pytest.fixture(scope="module")
def runners(tmp_path_factory) -> list[ModelRunner]:
    folder, plugins = tmp_path_factory.mktemp("cuda"), Plugins.load()
    limits = BuildConfig(max_batch_size=8, max_seq_len=128, max_num_tokens=16, tokens_per_block=16)
    build_engine(write_llama(folder / "hf"), folder / "engine", limits, plugins=plugins)
    return [ModelRunner.from_dir(folder / "engine", plugins=plugins, device=device) for device in ("cpu", "cuda")]


@pytest.mark.cuda
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 0, "top_p": 0.9, "temperature": 0.9, "random_seed": 3},
        {"top_k": 8, "top_p": 0.7, "min_p": 0.05, "random_seed": 3, "output_log_probs": True},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "min_length": 5},
        {"no_repeat_ngram_size": 2, "bad_words_list": [[7], [3, 3]], "embedding_bias": {9: 2.5}},
        {"stop_words_list": [[5], [8, 9]], "end_id": (4, 40)},
        {
            "max_time": 1e6,
            "stopping_criteria": (
                use("repetition", max_size=4, count=2),
                use("confidence", above=0.5, steps=2),
            ),
        },
        {"stopping_criteria": use("confidence", measure="entropy", below=2.5, steps=2)},
    ],
)
def test_tokens_on_the_gpu_equal_those_on_the_cpu(runners, fields):
    here, there = (runner.generate(PROMPTS, BASE.replace(**fields))["outputs"] for runner in runners)
    assert [output.tokens for output in there] == [output.tokens for output in here]
    assert [output.finish_reason for output in there] == [output.finish_reason for output in here]
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(torch.tensor(b.log_probs), torch.tensor(a.log_probs), rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "fields",
    [
        {"end_id": 90, "min_length": 2},
        SAMPLED,
    ],
    ids=["greedy", "sampled"],
)
def test_a_step_waits_for_its_tokens_and_for_nothing_else(runners, monkeypatch, fields):
    """Steps in which every row decodes, under PyTorch's debug mode, in which any other wait raises."""
    loop, wait = runners[1].generation.loop, Coming.wait
    waits, watched, calls = 0, False, dict.fromkeys(("launch", "land"), 0)

    def counted(self):
        nonlocal waits
        waits += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            return wait(self)
        finally:
            torch.cuda.set_sync_debug_mode("error" if watched else "default")

    def careful(name, method, slots_of):
        def call(*args):
            nonlocal waits, watched
            lengths = loop.branches.slots.lengths[slots_of(*args)]
            # Prompts are read in steps of their own, and sequences that end are cleared away.
            watched, waits = bool(lengths.min() > 30 and lengths.max() < 39), 0
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                return method(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                calls[name] += watched
                assert waits == (name == "land")
                watched = False

        return call

    monkeypatch.setattr(Coming, "wait", counted)
    monkeypatch.setattr(loop, "launch", careful("launch", loop.launch, lambda slots, counts: slots))
    monkeypatch.setattr(loop, "land", careful("land", loop.land, lambda flight: flight.slots))
    runners[1].generate([[1 + i] * 8 for i in range(6)], BASE.replace(max_new_tokens=40, **fields))
    assert min(calls.values()) >= 5


@pytest.mark.cuda
@pytest.mark.parametrize("fields", [{"end_id": 90, "min_length": 2}, SAMPLED], ids=["greedy", "sampled"])
def test_a_request_begins_and_ends_while_a_step_runs(runners, fields):
    """What is kept by slot is written in the order of the stream: PyTorch's debug mode raises where any waits."""
    loop = runners[1].generation.loop
    request = Request("0", tuple(range(1, 40)), SamplingConfig(max_new_tokens=5, **fields))
    plan = loop.check(request)
    loop.end(loop.admit(request, plan), "cancelled")  # the first one makes the plugins
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.end(loop.admit(request, plan), "cancelled")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_host_plugins_and_streams_on_the_gpu(runners):
    def run(runner):
        options = {"logits_processor": NoRepeat(), "stopping_criteria": At(), "streaming": True}
        return [(d.request_id, d.tokens, d.finish_reason) for d in runner.generate(PROMPTS, BASE, **options)]

    here, there = map(run, runners)
    assert there == here
    assert {reason for _, _, reason in there if reason} == {"length", "twenty"}
