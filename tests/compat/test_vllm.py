"""Processors written for vLLM: callables of one request, and batch processors of the V1 interface."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_core import SamplingConfig
from trtllm_core.compat import VLLMBatchProcessor, VLLMRequestProcessor
from trtllm_core.compat import vllm as module
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import BranchView, Phase

PROMPTS = [[5, 6], [11], [42, 17, 3], [5, 6]]
CONFIG = SamplingConfig(max_new_tokens=12, end_id=(), return_dict=True)


def lengths(*numbers):
    return [CONFIG.replace(max_new_tokens=n) for n in numbers]


# -- callables of one request ----------------------------------------------------------------------------------------


def no_repeats(generated, logits):
    out = logits.clone()
    out[generated] = -float("inf")
    return out


def nothing_of_the_prompt(prompt, generated, logits):
    logits[prompt] -= 2000
    logits[len(generated)] += 1000
    return logits


def test_callables(runner, by_hand):
    outputs = runner.generate(PROMPTS, CONFIG, logits_processor=VLLMRequestProcessor(no_repeats))["outputs"]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.tokens) == by_hand(runner, prompt, lambda t, x, p=prompt: no_repeats(t[len(p) :], x))
    outputs = runner.generate(PROMPTS, CONFIG, logits_processor=VLLMRequestProcessor(nothing_of_the_prompt))["outputs"]
    assert outputs[1].tokens[:11] == tuple(range(11)), "by the number of generated tokens"
    assert outputs[0].tokens[5] != 5, "a token of the prompt"


class Counter:
    def __init__(self):
        self.calls = 0

    def clone(self):
        return Counter()

    def __call__(self, generated, logits):
        assert self.calls == len(generated)
        self.calls += 1
        return logits


def test_callables_that_can_be_cloned_are(runner):
    counter = Counter()
    outputs = runner.generate(PROMPTS, CONFIG, logits_processor=VLLMRequestProcessor(counter))["outputs"]
    assert [output.finish_reason for output in outputs] == ["length"] * 4
    assert counter.calls == 0
    plugin = VLLMRequestProcessor(counter)
    state = plugin.start(BranchView("0", 0, 0, (1, 2), CONFIG, (), 7))
    assert plugin.copy(state)[1] is not state[1]


def test_callables_that_are_none_are_refused(runner):
    with pytest.raises(ConfigError, match="takes 1 arguments"):
        VLLMRequestProcessor(lambda logits: logits)
    (output,) = runner.generate([[5]], CONFIG, logits_processor=VLLMRequestProcessor(lambda ids, x: x[:5]))["outputs"]
    assert "returned no logits of shape [97]" in str(output.error)


# -- batch processors --------------------------------------------------------------------------------------------------


class Recorder:
    """As a processor of vLLM V1: forbids repeats to requests that ask for it, through what it was told of the batch."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.requests = {}
        self.updates = []
        self.sizes = []

    @classmethod
    def validate_params(cls, params):
        if params.extra_args.get("ban") not in (None, True):
            raise ValueError("ban must be true")

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        self.updates.append(batch_update)
        if batch_update is None:
            return
        for place in batch_update.removed:
            del self.requests[place]
        for place, params, prompt, generated in batch_update.added:
            self.requests[place] = (params, prompt, generated)
        for source, target, direction in batch_update.moved:
            assert direction.name == "UNIDIRECTIONAL"
            assert target not in self.requests
            self.requests[target] = self.requests.pop(source)
        assert sorted(self.requests) == list(range(batch_update.batch_size))

    def apply(self, logits):
        assert len(logits) == len(self.requests)
        self.sizes.append(len(logits))
        for place, (params, _, generated) in self.requests.items():
            if params.extra_args.get("ban"):
                logits[place, generated] = -float("inf")
        return logits


def make():
    return Recorder(None, torch.device("cpu"), False)


@pytest.mark.parametrize("kind", ["runner", "cramped"])
def test_a_batch_processor_follows_requests_that_come_and_go(request, by_hand, kind):
    runner = request.getfixturevalue(kind)
    recorder = make()
    plugin = VLLMBatchProcessor(recorder, lambda view: {"ban": True} if view.request_id in "02" else {})
    configs = lengths(3, 12, 7, 5)
    outputs = runner.generate(PROMPTS, configs, logits_processor=plugin)["outputs"]
    for i, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        banned = lambda t, x, p=prompt, i=i: x if i % 2 else no_repeats(t[len(p) :], x)  # noqa: E731
        assert list(output.tokens) == by_hand(runner, prompt, banned, configs[i].max_new_tokens)
    assert recorder.sizes[-1] == 1
    again = runner.generate(PROMPTS, configs, logits_processor=plugin)["outputs"]
    assert [output.tokens for output in again] == [output.tokens for output in outputs], "it serves the next batch too"
    if kind == "runner":
        assert recorder.updates[1] is None, "nobody came or left"
        assert recorder.updates[0].batch_size == 4
        assert [row[0] for row in recorder.updates[0].added] == [0, 1, 2, 3]
        (left,) = [update for update in recorder.updates[2:6] if update is not None and update.batch_size == 3]
        assert (list(left.removed), [move[:2] for move in left.moved]) == ([0], [(3, 0)])


def test_it_is_given_params_with_the_request_s_fields(runner):
    recorder = make()
    config = CONFIG.replace(temperature=0.5, top_k=3, random_seed=1)
    runner.generate(PROMPTS[:1], config, logits_processor=VLLMBatchProcessor(recorder, {"ban": True}))
    params, prompt, generated = recorder.updates[0].added[0][1:]
    assert (params.temperature, params.top_k, params.extra_args) == (0.5, 3, {"ban": True})
    assert prompt == PROMPTS[0]
    assert len(generated) == 12
    own = object()
    plugin = VLLMBatchProcessor(recorder, params=own)
    plugin.processor = type("Plain", (), {"update_state": lambda s, u: None, "apply": lambda s, x: x})()
    plugin.begin(0, BranchView("0", 0, 0, (1,), CONFIG, (), 7))
    assert plugin._members[0].params is own


def test_what_the_processor_refuses_is_refused(runner):
    calls = runner.session.engine.calls
    with pytest.raises(ConfigError, match="Recorder refuses the request: ban must be true"):
        runner.generate(PROMPTS, CONFIG, logits_processor=VLLMBatchProcessor(make(), {"ban": 3}))
    assert runner.session.engine.calls == calls
    with pytest.raises(ConfigError, match="give an instance of Recorder"):
        VLLMBatchProcessor(Recorder)


class Invariant(Recorder):
    def is_argmax_invariant(self):
        return True


def test_what_keeps_the_argmax_runs_after_the_temperature_and_may_be_left_out(runner):
    plugin = VLLMBatchProcessor(Invariant(None, None, False))
    assert (plugin.phase, VLLMBatchProcessor(make()).phase) == (Phase.TRUNCATION, Phase.BIAS)
    assert plugin.capabilities.argmax_invariant
    runner.generate(PROMPTS, CONFIG, logits_processor=plugin)
    assert plugin.processor.updates == [], "a greedy choice does not need it"


def test_forks_and_rewinds_are_requests_that_come_anew():
    plugin = VLLMBatchProcessor(recorder := make(), {"ban": True})
    for slot in range(3):
        plugin.begin(slot, BranchView(str(slot), 0, slot, (slot,), CONFIG, (), 7))
        plugin._members[slot].generated += [slot * 10, slot * 10 + 1]
    recorder.update_state(plugin._update())
    plugin.fork(torch.tensor([0, 1]), torch.tensor([1, 0]))
    plugin.rewind(2, 1)
    recorder.update_state(plugin._update())
    by_prompt = {prompt[0]: generated for _, prompt, generated in recorder.requests.values()}
    assert by_prompt == {0: [10, 11], 1: [0, 1], 2: [20]}
    assert plugin._update() is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_coming_and_going_leaves_the_processor_with_the_batch(events):
    """Several changes may lie between two steps; the recorder asserts that places are dense and never taken twice."""
    plugin = VLLMBatchProcessor(recorder := make())
    for number, (step, slot) in enumerate(events):
        if slot in plugin._members:
            plugin.end(slot)
        else:
            plugin.begin(slot, BranchView("0", 0, slot, (number,), CONFIG, (), 7))
        if step:
            recorder.update_state(plugin._update())
            known = {prompt[0] for _, prompt, _ in recorder.requests.values()}
            assert known == {member.prompt[0] for member in plugin._members.values()}
            assert [m.prompt for m in plugin._places] == [recorder.requests[i][1] for i in sorted(recorder.requests)]


def test_vllm_s_own_classes_are_used_where_they_are_loaded(monkeypatch):
    theirs = ModuleType(module.INTERFACE)
    theirs.BatchUpdate = type("BatchUpdate", (module.BatchUpdate,), {})
    monkeypatch.setitem(sys.modules, module.INTERFACE, theirs)
    plugin = VLLMBatchProcessor(make())
    plugin.begin(0, BranchView("0", 0, 0, (1,), CONFIG, (), 7))
    assert type(plugin._update()) is theirs.BatchUpdate
