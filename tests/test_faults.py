"""A plugin that misbehaves fails the requests that use it, with its name, and nobody else."""

from __future__ import annotations

import re

import pytest
import torch

from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.errors import ConfigError, PluginContractError, PluginRuntimeError
from trtllm_core.plugin import (
    Decoder,
    DeviceLogitsProcessor,
    DeviceStoppingCriterion,
    HostLogitsProcessor,
    HostStoppingCriterion,
    LogitsProcessor,
    Sampler,
    Selection,
    Stop,
    hookimpl,
)
from trtllm_core.testing.markov import MarkovExecutable

PROMPTS = [[5, 6], [11], [42, 17]]


class Raises(DeviceLogitsProcessor):
    """Ruins the logits of everybody, then raises at the fifth token of its branch."""

    def apply(self, logits, batch):
        if bool((batch.active & (batch.context.lengths[batch.slot] >= 6)).any()):
            logits.fill_(0)
            raise ZeroDivisionError("oops")
        logits[:, 3] = torch.where(batch.active, 99.0, logits[:, 3])


class WrongShape(DeviceLogitsProcessor):
    def apply(self, logits, batch):
        return logits[:, :5]


class WrongType(DeviceLogitsProcessor):
    def apply(self, logits, batch):
        return 7


class RaisesInBegin(DeviceLogitsProcessor):
    def begin(self, slot, view):
        raise KeyError("begin")

    def apply(self, logits, batch):
        return None


class RaisesInCommit(DeviceLogitsProcessor):
    def apply(self, logits, batch):
        return None

    def commit(self, batch):
        raise OSError("commit")


class HostRaises(HostLogitsProcessor):
    def process(self, state, tokens, logits):
        logits.fill_(0)
        raise ValueError("host")


class MaskRaises(HostLogitsProcessor):
    def mask(self, state, tokens, words):
        words.fill(0)
        raise ValueError("mask")


class StopRaises(HostStoppingCriterion):
    def check(self, state, tokens, new):
        raise ValueError("stop")


class StopWrong(HostStoppingCriterion):
    def check(self, state, tokens, new):
        return True


class DeviceStopWrong(DeviceStoppingCriterion):
    reason = "never"

    def check(self, batch):
        return batch.tokens


class BadSampler(Sampler):
    def sample(self, logits, batch):
        return logits


class Companions(DeviceLogitsProcessor):
    def apply(self, logits, batch):
        return None

    def companions(self, view):
        return [[1, 1000]]


class StopFloat(DeviceStoppingCriterion):
    reason = "never"

    def check(self, batch):
        return torch.zeros(len(batch.slot), dtype=self.dtype)

    dtype = torch.float32


class StopBool(StopFloat):
    dtype = torch.bool


class FloatSampler(Sampler):
    def sample(self, logits, batch):
        return logits.argmax(1).float()


class OutsideSampler(Sampler):
    """Right for two tokens, then beyond the vocabulary."""

    def sample(self, logits, batch):
        lengths = batch.context.lengths[batch.slot] - batch.context.prompt_lengths[batch.slot]
        return torch.where(lengths < 2, logits.argmax(1), 10**6).int()


class Silent(Decoder):
    def select(self, logits, batch):
        none = torch.zeros(len(logits), dtype=torch.int64)
        return Selection(none[:, None], none)


class Bad:
    """All of them, as a plugin."""

    hook_api = ("logits_processor>=1.0,<2", "stopping_criterion>=1.0,<2", "decoder>=1.0,<2")

    @hookimpl
    def trtllm_register_logits_processors(self, registrar):
        for cls in (Raises, WrongShape, WrongType, RaisesInBegin, RaisesInCommit, HostRaises, MaskRaises, Companions):
            registrar.add(cls.__name__, cls)
        registrar.add("not_a_processor", dict)
        registrar.add("cannot_be_made", lambda: 1 / 0)

    @hookimpl
    def trtllm_register_stopping_criteria(self, registrar):
        for cls in (StopRaises, StopWrong, DeviceStopWrong, StopFloat, StopBool):
            registrar.add(cls.__name__, cls)

    @hookimpl
    def trtllm_register_decoders(self, registrar):
        for cls in (BadSampler, FloatSampler, OutsideSampler, Silent):
            registrar.add(cls.__name__, cls)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load(extra=[Bad()])


@pytest.fixture
def runner(plugins) -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(), plugins=plugins)


GOOD = SamplingConfig(top_k=0, top_p=0.9, random_seed=3, end_id=(), max_new_tokens=12, return_dict=True)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"logits_processors": "Raises"}, PluginRuntimeError, "'Raises' raised ZeroDivisionError: oops"),
        ({"logits_processors": "WrongShape"}, PluginContractError, r"'WrongShape' returned float32 \[3, 5\]"),
        ({"logits_processors": "WrongType"}, PluginContractError, "'WrongType' returned a int"),
        ({"logits_processors": "RaisesInBegin"}, PluginRuntimeError, "'RaisesInBegin' raised KeyError"),
        ({"logits_processors": "RaisesInCommit"}, PluginRuntimeError, "'RaisesInCommit' raised OSError"),
        ({"logits_processors": "HostRaises"}, PluginRuntimeError, "'HostRaises' raised ValueError: host"),
        ({"logits_processors": "MaskRaises"}, PluginRuntimeError, "'MaskRaises' raised ValueError: mask"),
        ({"stopping_criteria": "StopRaises"}, PluginRuntimeError, "'StopRaises' raised ValueError: stop"),
        ({"stopping_criteria": "StopWrong"}, PluginContractError, "'StopWrong' returned a bool"),
        ({"stopping_criteria": "DeviceStopWrong"}, PluginContractError, "'DeviceStopWrong' returned"),
        ({"stopping_criteria": "StopFloat"}, PluginContractError, "'StopFloat' returned"),
        ({"stopping_criteria": "StopBool"}, PluginContractError, "'StopBool' returned"),
        ({"decoder": "BadSampler"}, PluginContractError, "one token for each"),
        ({"decoder": "FloatSampler"}, PluginContractError, "'FloatSampler' returned torch.float32 .* as tokens"),
        ({"decoder": "OutsideSampler"}, PluginContractError, "'OutsideSampler' chose token 1000000, outside"),
        ({"decoder": "Silent"}, PluginContractError, "'Silent' chose 0 of 1 tokens"),
    ],
)
def test_who_uses_a_broken_plugin_fails_and_the_others_do_not_notice(runner, fields, error, words):
    expected = runner.generate(PROMPTS, GOOD)["outputs"]
    bad = GOOD.replace(**fields)
    if "decoder" in fields:
        bad = SamplingConfig(decoder=fields["decoder"], end_id=(), max_new_tokens=12, output_log_probs=True)
    got = runner.generate(PROMPTS, [GOOD, bad, GOOD])["outputs"]
    assert got[1].finish_reason == "plugin_error"
    assert isinstance(got[1].error, error)
    assert re.search(words, str(got[1].error)), got[1].error
    for i in (0, 2):
        assert got[i].tokens == expected[i].tokens
        assert got[i].finish_reason == "length"
    again = runner.generate(PROMPTS, GOOD)["outputs"]
    assert [o.tokens for o in again] == [o.tokens for o in expected], "and the session lives on"
    usage = runner.generation.loop.cache.usage()
    assert usage.free == usage.total


def test_the_tokens_before_the_failure_are_kept(runner):
    got = runner.generate([[5, 6]], GOOD.replace(logits_processors="Raises"))["outputs"][0]
    assert got.tokens == (3, 3, 3, 3)


def test_a_streaming_user_is_told(runner):
    last = list(runner.generate([[5, 6]], GOOD.replace(stopping_criteria="StopRaises"), streaming=True))[-1]
    assert (last.finish_reason, last.tokens) == ("plugin_error", ())
    assert "StopRaises" in str(last.error)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (
            {"logits_processors": "not_a_processor"},
            PluginContractError,
            "'not_a_processor' is a dict, not a LogitsProcessor",
        ),
        ({"logits_processors": "cannot_be_made"}, PluginRuntimeError, "'cannot_be_made' of local .* ZeroDivisionError"),
        ({"logits_processors": "Companions"}, PluginContractError, "'Companions' .* token id 1000, outside the vocabu"),
        ({"logits_processors": [use("Raises", a=1)]}, ConfigError, "takes no parameters"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_token(runner, fields, error, words):
    calls = runner.session.engine.calls
    with pytest.raises(error, match=words):
        runner.generate(PROMPTS, [GOOD, GOOD.replace(**fields), GOOD])
    assert runner.session.engine.calls == calls


def test_objects_are_plugins_too(runner):
    class Only(LogitsProcessor):
        pass

    class Force(HostLogitsProcessor):
        def process(self, state, tokens, logits):
            logits.fill_(-1e9)
            logits[len(tokens)] = 0

    class Third(HostStoppingCriterion):
        def check(self, state, tokens, new):
            return Stop("third") if len(tokens) + len(new) == 5 else None

    out = runner.generate([[5, 6]], GOOD, logits_processor=Force(), stopping_criteria=[Third()])["outputs"][0]
    assert (out.tokens, out.finish_reason) == ((2, 3, 4), "third")
    with pytest.raises(PluginContractError, match="LogitsProcessor"):
        runner.generate([[5, 6]], GOOD, logits_processor=[print])


def test_debug_mode_finds_nan(plugins):
    class Nan(DeviceLogitsProcessor):
        def apply(self, logits, batch):
            logits[0, 0] = torch.nan

    r = ModelRunner.from_engine(MarkovExecutable(), debug_mode=True, plugins=plugins)
    out = r.generate([[1]], GOOD, logits_processor=Nan())["outputs"][0]
    assert "'Nan' left NaN" in str(out.error)
