"""One session, many plans: one order for all, objects that come and go, and what a plan refuses."""

from __future__ import annotations

import pytest
import torch
from pydantic import BaseModel

from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.decoding import stages as stages_module
from trtllm_core.decoding.planner import Planner
from trtllm_core.decoding.samplers import log_probs
from trtllm_core.errors import ConfigError, PluginContractError
from trtllm_core.plugin import (
    Decoder,
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    HostStoppingCriterion,
    Phase,
    Selection,
    Stop,
    StoppingCapabilities,
    hookimpl,
)
from trtllm_core.testing.markov import MarkovExecutable


class Left(DeviceLogitsProcessor):
    """Asks to run after ``right``, which asks to run after it."""

    after = ("right",)

    def apply(self, logits, batch):
        return None


class Right(Left):
    after = ("left",)


class Early(Left):
    phase = Phase.TEMPERATURE
    after = ("late",)


class Late(Left):
    phase = Phase.TRUNCATION
    after = ()


class Plain(BaseModel):
    """Ignores names that it does not know, as pydantic's models do unless told otherwise."""

    rate: float = 1.0


class Takes(Left):
    Params = Plain
    after = ()


class Second(Decoder):
    """The second largest logit, with log-probabilities of its own."""

    def select(self, logits, batch):
        tokens = logits.topk(2).indices[:, 1:]
        return Selection(tokens, torch.ones(len(tokens), dtype=torch.int64), torch.full(tokens.shape, -7.0))


class StopsAtOnce(HostStoppingCriterion):
    def check(self, state, tokens, new):
        return Stop(type(self).__name__)


class StopsToo(StopsAtOnce):
    pass


class Extra:
    hook_api = ("logits_processor>=1.0,<2", "decoder>=1.0,<2", "stopping_criterion>=1.0,<2")

    @hookimpl
    def trtllm_register_stopping_criteria(self, registrar):
        registrar.add("at_once", StopsAtOnce)
        registrar.add("too", StopsToo)

    @hookimpl
    def trtllm_register_logits_processors(self, registrar):
        for cls in (Left, Right, Early, Late, Takes):
            registrar.add(cls.__name__.lower(), cls)

    @hookimpl
    def trtllm_register_decoders(self, registrar):
        registrar.add("second", Second)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load(extra=[Extra()])


@pytest.fixture
def runner(plugins) -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(), plugins=plugins)


CONFIG = SamplingConfig(end_id=(), max_new_tokens=4, return_dict=True)


@pytest.mark.parametrize("pair", [("left", "right"), ("early", "late")])
def test_two_sound_plans_that_contradict_each_other_never_meet(runner, pair):
    one, other = (CONFIG.replace(logits_processors=name) for name in pair)
    for config in (one, other):
        assert runner.generate([[5]], config)["finish_reasons"] == ["length"], "one after the other they may"
    calls = runner.session.engine.calls
    with pytest.raises(ConfigError, match="cannot run together with others"):
        runner.generate([[5], [6]], [one, other])
    assert runner.session.engine.calls == calls
    assert runner.generate([[5]], CONFIG)["finish_reasons"] == ["length"]


def test_the_criterion_registered_first_wins_whoever_was_used_first(runner):
    configs = [CONFIG.replace(stopping_criteria=names) for names in (["too"], ["at_once", "too"])]
    assert runner.generate([[5], [6]], configs)["finish_reasons"] == ["StopsToo", "StopsAtOnce"]


def test_objects_are_forgotten_with_their_last_branch_but_not_their_seconds(runner):
    branches = runner.generation.loop.branches
    for _ in range(3):
        runner.generate([[5], [6]], CONFIG, logits_processor=[Late(), Late()])
    kept = [stage.name for stage in branches.pipeline._all.values()]
    assert "Late" not in kept
    assert "min_length" in kept
    total = branches.plugin_seconds()["Late"]
    runner.generate([[5]], CONFIG, logits_processor=Late())
    assert 0 < total < branches.plugin_seconds()["Late"]


class Slow(DeviceLogitsProcessor):
    """Takes 100 seconds to begin, 6 a step and 1000 to end, by a clock of its own."""

    def __init__(self):
        self.now = 0.0

    def begin(self, slot, view):
        self.now += 100

    def apply(self, logits, batch):
        self.now += 6

    def end(self, slot):
        self.now += 1000


def test_seconds_of_a_call_are_shared_by_who_uses_the_plugin_then(runner, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(stages_module.time, "perf_counter", lambda: slow.now)
    told = {}
    monkeypatch.setattr(
        runner.generation.plugins, "on_request_end", lambda stats: told.update({stats.request_id: stats})
    )
    lengths = (1, 3)
    configs = [CONFIG.replace(max_new_tokens=n) for n in lengths]
    first, second = runner.generate([[5], [6]], configs, logits_processor=slow)["outputs"]
    assert first.plugin_seconds["Slow"] == 100 + 6 / 2 + 1000
    assert second.plugin_seconds["Slow"] == 100 + 6 / 2 + 6 + 6 + 1000
    assert told["1"].plugin_seconds == second.plugin_seconds
    assert runner.generation.loop.branches.plugin_seconds()["Slow"] == slow.now, "nothing is lost or counted twice"
    after = runner.generate([[5]], CONFIG)["outputs"][0].plugin_seconds
    assert "Slow" not in after
    assert after.keys() >= {"greedy", "max_tokens"}


def test_a_plugin_is_used_once_a_request(runner):
    with pytest.raises(ConfigError, match="'late' is there twice"):
        runner.generate([[5]], CONFIG, logits_processors=["late", "late"])
    late = Late()
    with pytest.raises(ConfigError, match="'Late' is there twice"):
        runner.generate([[5]], CONFIG, logits_processor=[late, late])


def test_a_plain_model_of_parameters_is_strict_too(plugins):
    planner = Planner(plugins)
    planner.plan(SamplingConfig(logits_processors=use("takes", rate=2)))
    with pytest.raises(ConfigError, match="'takes' has no parameter 'ratte'; it has 'rate'"):
        planner.plan(SamplingConfig(logits_processors=use("takes", ratte=2)))


class HostBegins(HostLogitsProcessor):
    def begin(self, slot, view):
        """Never called."""


class HostCommits(HostStoppingCriterion):
    def check(self, state, tokens, new):
        return None

    def commit(self, batch):
        """Never called."""


class HostLooks(HostStoppingCriterion):
    capabilities = StoppingCapabilities(needs=frozenset({"logits"}))

    def check(self, state, tokens, new):
        return None


@pytest.mark.parametrize(
    ("objects", "error", "words"),
    [
        ({"logits_processor": HostBegins()}, PluginContractError, "'HostBegins' .* has begin, .*: write start"),
        ({"stopping_criteria": HostCommits()}, PluginContractError, "'HostCommits' .* has commit, .*: write accept"),
        ({"stopping_criteria": HostLooks()}, ConfigError, "'HostLooks' needs 'logits'"),
    ],
)
def test_what_is_declared_and_not_honoured_is_refused(runner, objects, error, words):
    with pytest.raises(error, match=words):
        runner.generate([[5]], CONFIG, **objects)
    assert runner.session.engine.calls == 0


def test_decoders_side_by_side_keep_their_log_probs(runner):
    ask = CONFIG.replace(output_log_probs=True)
    own, computed = runner.generate([[5], [6]], [ask.replace(decoder="second"), ask])["outputs"]
    assert own.log_probs == (-7.0,) * 4
    table = runner.session.engine.table
    steps = [6, *computed.tokens]
    expected = log_probs(table[steps[:-1]], torch.tensor(steps[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(computed.log_probs), expected)
    assert table[5].argsort(descending=True)[1] == own.tokens[0]


def test_seconds_of_one_name_add_up(runner):
    branches = runner.generation.loop.branches
    runner.generate([[5]], CONFIG, logits_processor=Late())
    first = branches.plugin_seconds()["Late"]
    stream = runner.generate([[5]], CONFIG, streaming=True, logits_processor=[Late(), Late()])
    next(stream)
    stages = [stage for stage in branches.pipeline.live if stage.name == "Late"]
    assert len(stages) == 2
    assert branches.plugin_seconds()["Late"] == pytest.approx(first + sum(stage.seconds for stage in stages))
    stream.close()
