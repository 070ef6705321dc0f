"""How requests and batches end early, by a plugin, the engine or the user: told once, and nothing is lost."""

from __future__ import annotations

import pytest

from trtllm_core import ModelRunner, Plugins, SamplingConfig
from trtllm_core.config import BuildConfig
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.errors import ConfigError, PluginRuntimeError
from trtllm_core.plugin import DeviceLogitsProcessor, HostLogitsProcessor, HostStoppingCriterion, hookimpl
from trtllm_core.testing.markov import MarkovExecutable

PROMPTS = [[5, 6], [11], [42, 17]]
GOOD = SamplingConfig(top_k=0, top_p=0.9, random_seed=3, end_id=(), max_new_tokens=12, return_dict=True)


class RaisesInApply(DeviceLogitsProcessor):
    def apply(self, logits, batch):
        raise ZeroDivisionError("apply")


class RaisesInCommit(DeviceLogitsProcessor):
    def apply(self, logits, batch):
        return None

    def commit(self, batch):
        raise OSError("commit")


class PendingRaises(HostStoppingCriterion):
    def check(self, state, tokens, new):
        return None

    def pending_text(self, state):
        raise ValueError("pending")


class Refuses(HostLogitsProcessor):
    def start(self, view):
        raise ConfigError("not with this prompt")


class Faulty:
    """The two as a plugin."""

    hook_api = "logits_processor>=1.0,<2"

    @hookimpl
    def trtllm_register_logits_processors(self, registrar):
        for cls in (RaisesInApply, RaisesInCommit):
            registrar.add(cls.__name__, cls)


@pytest.fixture
def runner() -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable())


def assert_nothing_is_lost(runner):
    loop = runner.generation.loop
    assert (loop.branches.slots.free, loop.branches.live) == (loop.branches.slots.context.slots, {})
    assert not any(stages.live or stages._of for stages in loop.branches.stages)
    usage = loop.cache.usage()
    assert usage.free == usage.total
    loop.cache.policy.check_integrity()


class Watches:
    """Notes what observers are told."""

    hook_api = "observer>=1.0,<2"

    def __init__(self):
        self.ends, self.steps, self.sessions = {}, [], 0

    @hookimpl
    def trtllm_on_request_end(self, stats):
        assert stats.request_id not in self.ends, "told once"
        self.ends[stats.request_id] = stats.finish_reason

    @hookimpl
    def trtllm_on_step_end(self, stats):
        self.steps.append((stats.context_tokens, stats.generation_tokens))

    @hookimpl
    def trtllm_on_session_end(self, stats):
        self.sessions += 1


@pytest.fixture
def watched():
    """A runner whose steps have seven tokens, and what its observer is told."""
    watches = Watches()
    build = BuildConfig(max_batch_size=6, max_input_len=100, max_seq_len=128, max_num_tokens=7, tokens_per_block=8)
    plugins = Plugins.load(extra=[Faulty(), watches])
    return ModelRunner.from_engine(MarkovExecutable(build=build), plugins=plugins), watches


@pytest.mark.parametrize("name", ["RaisesInCommit", "RaisesInApply"])
def test_a_failure_ends_the_branches_whose_prompt_is_not_through(watched, name):
    runner, watches = watched
    bad = GOOD.replace(logits_processors=name)
    deltas = list(runner.generate([[5], [4] * 50, [11]], [bad, bad, GOOD], streaming=True))
    ends = {delta.request_id: delta.finish_reason for delta in deltas if delta.finish_reason}
    assert ends == watches.ends == {"0": "plugin_error", "1": "plugin_error", "2": "length"}
    assert all(name in str(delta.error) for delta in deltas if delta.finish_reason == "plugin_error")
    assert_nothing_is_lost(runner)


def test_steps_are_counted_by_what_they_run(watched):
    runner, watches = watched
    runner.generate([[5], [4] * 10], SamplingConfig(max_new_tokens=3, end_id=()))
    assert watches.steps == [(7, 0), (4, 1), (0, 2), (0, 1)]


def test_who_leaves_a_stream_cancels_the_rest(watched):
    runner, watches = watched
    stream = runner.generate(PROMPTS, [GOOD.replace(max_new_tokens=1), GOOD, GOOD], streaming=True)
    next(stream)
    second = runner.generate(PROMPTS, GOOD, streaming=True)
    with pytest.raises(ConfigError, match="another batch is still running on this session"):
        next(second)
    with pytest.raises(ConfigError, match="another batch"):
        runner.generate(PROMPTS, GOOD)
    stream.close()
    assert watches.ends == {"0": "length", "1": "cancelled", "2": "cancelled"}
    assert_nothing_is_lost(runner)
    watches.ends.clear()
    assert runner.generate(PROMPTS, GOOD)["finish_reasons"] == ["length"] * 3


def test_an_engine_that_fails_cancels_all(watched, monkeypatch):
    runner, watches = watched

    def fail(inputs, outputs, stream):
        raise RuntimeError("no more")

    stream = runner.generate(PROMPTS, GOOD, streaming=True)
    next(stream)
    monkeypatch.setattr(runner.session.engine, "execute", fail)
    with pytest.raises(Exception, match="no more"):
        list(stream)
    assert watches.ends == dict.fromkeys("012", "cancelled")
    assert_nothing_is_lost(runner)


def test_without_a_dictionary_the_error_is_raised_after_all_have_ended(watched):
    runner, watches = watched
    bad, plain = GOOD.replace(return_dict=False, logits_processors="RaisesInApply"), GOOD.replace(return_dict=False)
    with pytest.raises(PluginRuntimeError, match="'RaisesInApply' raised"):
        runner.generate(PROMPTS, [plain, bad, plain])
    assert watches.ends == {"0": "length", "1": "plugin_error", "2": "length"}
    watches.ends.clear()
    histories = runner.generate(PROMPTS, [plain, bad, plain], streaming=True, full=True)
    seen = []
    with pytest.raises(PluginRuntimeError, match="'RaisesInApply' raised"):
        seen.extend(histories)
    assert watches.ends == {"0": "length", "1": "plugin_error", "2": "length"}


@pytest.mark.parametrize(
    ("fields", "objects", "words"),
    [
        ({"embedding_bias": {97: 1.0}}, {}, "embedding_bias: token 97"),
        ({}, {"logits_processor": Refuses()}, "not with this prompt"),
    ],
)
def test_a_users_mistake_found_in_begin_stays_a_config_error(runner, fields, objects, words):
    with pytest.raises(ConfigError, match=words):
        runner.generate(PROMPTS, [GOOD, GOOD, GOOD.replace(**fields)], **objects)
    assert runner.session.engine.calls == 0
    assert_nothing_is_lost(runner)


def test_an_interrupt_in_begin_gives_slot_and_blocks_back(runner):
    class Interrupts(DeviceLogitsProcessor):
        def begin(self, slot, view):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.generate(PROMPTS, GOOD, logits_processor=Interrupts())
    loop = runner.generation.loop
    assert loop.branches.slots.free == 8
    assert loop.cache.usage().free == loop.cache.usage().total


def test_text_that_is_held_back_by_a_broken_criterion(runner):
    runner.generation.loop.branches.token_bytes = TokenBytes([bytes([i]) for i in range(97)])
    deltas = list(runner.generate([[5]], GOOD, streaming=True, text=True, stopping_criteria=PendingRaises()))
    assert [delta.finish_reason for delta in deltas] == ["plugin_error"]
    assert "'PendingRaises' raised ValueError: pending" in str(deltas[0].error)
    assert_nothing_is_lost(runner)


def test_a_session_is_closed_once(watched):
    runner, watches = watched
    with runner as same, same.generation:
        assert same is runner
    runner.close()
    assert watches.sessions == 1
