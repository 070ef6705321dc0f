"""Steps that are launched before the tokens of the one before have come back: nobody can tell, but by the time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from trtllm_core import BuildConfig, Executor, ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.plugin import (
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    HostStoppingCriterion,
    Sampler,
    Stop,
    hookimpl,
)
from trtllm_core.testing.markov import MarkovExecutable

BASE = SamplingConfig(end_id=(), max_new_tokens=14, return_dict=True)
DRAWS = BASE.replace(top_k=0, top_p=0.9, random_seed=3)
BUILD = BuildConfig(max_batch_size=8, max_beam_width=3, max_seq_len=128, max_input_len=127)
PROMPTS = [[5, 6], [11], [42, 17, 3], [9] * 20]


class StopsAt(HostStoppingCriterion):
    """The end at the ``at``-th token, of which the device knows nothing."""

    def __init__(self, at: int) -> None:
        self.at = at

    def start(self, view: Any) -> int:
        return 0

    def accept(self, state: int, tokens: Any) -> int:
        return state + len(tokens)

    def check(self, state: int, tokens: Any, new: Any) -> Stop | None:
        return Stop("enough", self.at - state - 1) if state + len(new) >= self.at else None


class Lowers(HostLogitsProcessor):
    def process(self, state: Any, tokens: Any, logits: torch.Tensor) -> None:
        logits[: len(logits) // 2] -= 0.3 * len(tokens)


class Counts(DeviceLogitsProcessor):
    """Raises at its ``at``-th step, in ``apply`` or in ``commit``."""

    def __init__(self, where: str = "", at: int = 0) -> None:
        self.where, self.at, self.steps = where, at, 0

    def setup(self, context: Any) -> None:
        self.committed = torch.zeros(context.slots, dtype=torch.int64, device=context.device)

    def begin(self, slot: int, view: Any) -> None:
        self.committed[slot] = 0

    def apply(self, logits: torch.Tensor, batch: Any) -> None:
        self.steps += 1
        if self.where == "apply" and self.steps == self.at:
            raise ZeroDivisionError("as planned")
        context, slot = batch.context, batch.slot
        assert torch.equal(self.committed[slot], context.lengths[slot] - context.prompt_lengths[slot])

    def commit(self, batch: Any) -> None:
        self.committed[batch.slot] += torch.where(batch.active, batch.counts, 0)
        if self.where == "commit" and self.steps == self.at:
            raise OSError("as planned")


class Wrong(Sampler):
    """Chooses what is no token after three that are some."""

    def sample(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        context, slot = batch.context, batch.slot
        return torch.where(context.lengths[slot] - context.prompt_lengths[slot] == 3, 10**6, 7)


class Odd:
    """They, as a plugin."""

    hook_api = ("decoder>=1.0,<2", "logits_processor>=1.0,<2")

    @hookimpl
    def trtllm_register_logits_processors(self, registrar: Any) -> None:
        registrar.add("lowers", Lowers)

    @hookimpl
    def trtllm_register_decoders(self, registrar: Any) -> None:
        registrar.add("wrong", Wrong)


def runner(look_ahead: bool) -> ModelRunner:
    return ModelRunner.from_engine(
        MarkovExecutable(build=BUILD), plugins=Plugins.load(extra=[Odd()]), look_ahead=look_ahead
    )


@pytest.fixture(scope="module")
def runners() -> tuple[ModelRunner, ModelRunner]:
    return runner(False), runner(True)


def told(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(o.tokens, o.finish_reason, o.matched, o.cum_log_prob, type(o.error)) for o in result["outputs"]]


def assert_nothing_is_lost(runner: ModelRunner) -> None:
    loop = runner.generation.loop
    usage = loop.cache.usage()
    assert usage.free == usage.total
    assert loop.branches.slots.free == loop.branches.slots.context.slots
    assert not loop.branches.live


@pytest.mark.parametrize(
    ("config", "plugins"),
    [
        (BASE, {}),
        (BASE.replace(end_id=(7, 36, 90, 88)), {}),
        (DRAWS, {}),
        ([DRAWS.replace(max_new_tokens=n, random_seed=n) for n in (1, 2, 9, 14)], {}),
        (DRAWS.replace(repetition_penalty=1.3, no_repeat_ngram_size=2, min_length=5, end_id=(1, 2)), {}),
        (DRAWS.replace(bad_words_list=[[5], [6, 7]], stop_words_list=[[3], [8, 9], [14]]), {}),
        (DRAWS.replace(num_return_sequences=3), {}),
        (DRAWS.replace(decoder=use("mirostat")), {}),
        (BASE.replace(num_beams=3, end_id=(7, 36)), {}),
        (BASE.replace(decoder="ngram"), {}),
        (DRAWS.replace(output_log_probs=True, output_cum_log_probs=True), {}),
        ([DRAWS, BASE.replace(num_beams=2), DRAWS.replace(preset="hf"), BASE], {}),
        (DRAWS, {"stopping_criteria": lambda: StopsAt(5)}),
        (DRAWS, {"logits_processor": Lowers}),
        (DRAWS, {"logits_processor": Counts}),
        (DRAWS, {"logits_processor": lambda: Counts("apply", 4)}),
        (DRAWS, {"logits_processor": lambda: Counts("commit", 4)}),
        ([BASE.replace(decoder="wrong"), BASE, DRAWS, DRAWS], {}),
    ],
    ids=lambda value: None,
)
def test_the_same_answers(runners: tuple[ModelRunner, ModelRunner], config: Any, plugins: dict[str, Any]) -> None:
    def answers(one: ModelRunner) -> list[tuple[Any, ...]]:
        configs = config if isinstance(config, list) else [config] * len(PROMPTS)
        return told(one.generate(PROMPTS, configs, **{name: make() for name, make in plugins.items()}))

    here, ahead = map(answers, runners)
    assert ahead == here
    for one in runners:
        assert_nothing_is_lost(one)


def test_a_step_is_launched_before_the_one_before_has_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    one, told = runner(True), []
    loop = one.generation.loop
    for name in ("launch", "land"):
        method = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *args, name=name, method=method: (told.append(name), method(*args))[1])
    one.generate([[5], [6]], BASE.replace(max_new_tokens=4))
    assert told == ["launch", "launch", "land", "launch", "land", "launch", "land", "land"]
    assert loop.steps == 4, "nobody's end by length was a surprise"
    told.clear()
    one.generate([[5], [6]], DRAWS.replace(max_new_tokens=3), logits_processor=Lowers())
    assert told == ["launch", "land"] * 3, "what the host processes waits for the host"


def test_an_end_that_only_the_host_sees_costs_one_step_and_no_token(runners: tuple[ModelRunner, ModelRunner]) -> None:
    steps = []
    for one in runners:
        before = one.generation.loop.steps
        (output,) = one.generate([[5]], BASE, stopping_criteria=StopsAt(5))["outputs"]
        assert (len(output.tokens), output.finish_reason) == (5, "enough")
        steps.append(one.generation.loop.steps - before)
    assert steps == [5, 6]


def test_who_leaves_a_stream_leaves_nothing_in_flight(runners: tuple[ModelRunner, ModelRunner]) -> None:
    _, one = runners
    stream = one.generate([[5], [6]], BASE, streaming=True)
    next(stream)
    stream.close()
    assert_nothing_is_lost(one)
    (again,) = one.generate([[11]], BASE)["outputs"]
    assert again.tokens == runners[0].generate([[11]], BASE)["outputs"][0].tokens


def test_streams_tell_the_same_in_the_same_order(runners: tuple[ModelRunner, ModelRunner]) -> None:
    here, there = ([(d.request_id, d.tokens) for d in one.generate(PROMPTS, DRAWS, streaming=True)] for one in runners)
    assert there == here
    assert all(a != b for a, b in pairwise(there))


def successors() -> torch.Tensor:
    """Logits after which each token is followed by the next one."""
    return torch.full((97, 97), -5.0).index_put_((torch.arange(97), (torch.arange(97) + 1) % 97), torch.tensor(5.0))


@pytest.mark.parametrize(
    "late",
    [
        BASE.replace(output_log_probs=True),
        BASE.replace(num_beams=2),
        BASE.replace(decoder="ngram"),
        BASE.replace(logits_processors=use("lowers")),
    ],
    ids=["log_probs", "beams", "drafts", "host"],
)
def test_who_needs_the_host_arrives_while_others_are_in_flight(late: SamplingConfig) -> None:
    """A row ends while a step with it is under way, and its slot goes to a request that waits for each step."""
    prompts, ends = [[5], [20], [30], [40], [50]], BASE.replace(end_id=(12,))
    configs = [ends, BASE, BASE, BASE, late]
    told, stats = [], []
    for look_ahead in (False, True):
        build = BuildConfig(max_batch_size=2, max_beam_width=2, max_seq_len=128, max_input_len=127)
        engine, plugins = MarkovExecutable(build=build, table=successors()), Plugins.load(extra=[Odd()])
        with Executor(ModelRunner.from_engine(engine, plugins=plugins, look_ahead=look_ahead)) as executor:
            handles = [executor.submit(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
            told.append([handle.result(60)[0].tokens for handle in handles])
        stats = executor.get_latest_iteration_stats()
        assert sum(one.new_requests for one in stats) == len(prompts)
        assert sum(one.completed_requests for one in stats) == len(prompts)
    assert told[1] == told[0]
    assert told[0][0] == (6, 7, 8, 9, 10, 11, 12)


def test_a_failed_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine raises while a step is under way: the session goes on with the next request as if new."""
    one = runner(True)
    due = one.generate([[11]], BASE)["outputs"][0].tokens
    execute, calls = one.session.engine.execute, []

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise OSError("as planned")
        execute(*args)

    monkeypatch.setattr(one.session.engine, "execute", fails)
    with pytest.raises(OSError, match="as planned"):
        one.generate([[5], [6]], BASE)
    assert_nothing_is_lost(one)
    (again,) = one.generate([[11]], BASE)["outputs"]
    assert again.tokens == due
