"""The main job on a real model: SmolLM2-135M-Instruct in float32, with transformers as the oracle."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, build_engine
from trtllm_core.plugin import DeviceLogitsProcessor

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]

GREEDY = SamplingConfig(max_new_tokens=64, end_id=(), min_length=0, return_dict=True)


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path, tmp_path_factory, plugins: Plugins) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "smollm2"
    build_engine(smollm2_gguf, directory, BuildConfig(dtype="float32", max_seq_len=512), plugins=plugins)
    return directory


@pytest.fixture(scope="module")
def runner(engine: Path, plugins) -> ModelRunner:
    return ModelRunner.from_dir(engine, plugins=plugins)


def test_greedy_tokens_equal_transformers_in_a_ragged_batch(runner, prompts, expected):
    assert [output.tokens for output in runner.generate(prompts, GREEDY)["outputs"]] == expected


def test_and_each_alone(runner, prompts, expected):
    for prompt, tokens in zip(prompts[:3], expected, strict=False):
        assert runner.generate([prompt], GREEDY)["outputs"][0].tokens == tokens


def test_logits_are_within_a_thousandth(runner, peer, prompts, expected):
    """Teacher-forced over prompt and answer, through the session's log-probabilities and the raw logits."""
    loop = runner.generation.loop
    seen: list[torch.Tensor] = []
    run = loop.session.run

    def recorded(inputs, outputs, stream=0):
        done = run(inputs, outputs, stream)
        seen.append(outputs["logits"].clone())
        return done

    loop.session.run = recorded
    try:
        runner.generate([prompts[3]], GREEDY)
    finally:
        del loop.session.run
    with torch.inference_mode():
        text = torch.tensor([[*prompts[3], *expected[3][:-1]]])
        logits = peer(text).logits[0, len(prompts[3]) - 1 :]
    assert (torch.cat(seen) - logits).abs().max() < 1e-3


def test_batch_invariant_mode_is_bit_equal(engine, plugins, prompts, expected):
    """In this mode a request's logits do not depend on its company, to the last bit."""
    runner = ModelRunner.from_dir(engine, plugins=plugins, batch_invariant=True)
    config = GREEDY.replace(max_new_tokens=8)
    loop = runner.generation.loop
    by_slot: dict[int, list[torch.Tensor]] = {}
    run = loop._run

    def recorded(rows):
        logits = run(rows)
        for slot, row in zip(rows.slots[rows.asking].tolist(), logits, strict=True):
            by_slot.setdefault(slot, []).append(row.clone())
        return logits

    loop._run = recorded
    together = runner.generate(prompts, config)["outputs"]
    crowd = dict(by_slot)
    assert [output.tokens for output in together] == [tokens[:8] for tokens in expected]
    for i in (0, 5):
        by_slot.clear()
        runner.generate([prompts[i]], config)
        (alone,) = by_slot.values()
        assert len(alone) == 8
        assert all(torch.equal(a, b) for a, b in zip(alone, crowd[i], strict=True))


def test_it_answers(runner, prompts):
    out = runner.generate([prompts[0]], SamplingConfig(max_new_tokens=32, return_dict=True), text=True)["outputs"][0]
    assert out.text == "The capital of France is Paris."
    assert out.finish_reason == "end_id"


def test_stop_string_cuts_the_text(runner, prompts):
    config = SamplingConfig(max_new_tokens=32, stop_strings=" is Par", return_dict=True)
    out = runner.generate([prompts[0]], config, text=True)["outputs"][0]
    assert (out.text, out.finish_reason, out.matched) == ("The capital of France", "stop_string", " is Par")
    deltas = runner.generate([prompts[0]], config, text=True, streaming=True)
    assert "".join(delta.text for delta in deltas) == "The capital of France", "and nothing of it was shown before"


class Counts(DeviceLogitsProcessor):
    """Reads all logits and keeps a count: the least that a plugin with state does."""

    def setup(self, context):
        self.tokens = torch.zeros(context.slots, dtype=torch.int64)
        self.largest = torch.zeros(context.slots)

    def apply(self, logits, batch):
        self.largest[batch.slot] = logits.amax(-1)

    def commit(self, batch):
        self.tokens[batch.slot] += batch.counts


def test_five_plugins_cost_at_most_three_percent_of_a_step(runner, prompts):
    """All that the pipeline does for them, over the time of the steps it is part of: load on the machine slows both."""
    pipeline, loop = runner.generation.loop.branches.pipeline, runner.generation.loop
    calls = [(pipeline, "apply"), (pipeline, "commit_device"), (loop, "launch"), (loop, "land")]
    spent = {name: 0.0 for _, name in calls}

    def timed(name, function):
        def call(*args, **options):
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    counters = [type(f"Counts{i}", (Counts,), {})() for i in range(5)]
    for owner, name in calls:
        setattr(owner, name, timed(name, getattr(owner, name)))
    try:
        runner.generate([prompts[0]], GREEDY.replace(max_new_tokens=32), logits_processor=counters)
    finally:
        for owner, name in calls:
            delattr(owner, name)
    assert all(int(counter.tokens.sum()) == 32 for counter in counters)
    step = spent["launch"] + spent["land"]
    share = (spent["apply"] + spent["commit_device"]) / step
    print(f"five plugins: {share:.2%} of a step of {step / 32 * 1e3:.1f} ms")
    assert share <= 0.03
