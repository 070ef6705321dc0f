"""Companions: branches that run beside others, with the same tokens behind another prompt, and that nobody sees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trtllm_core import Executor, ExecutorConfig, KVCacheConfig, ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.cli import explain
from trtllm_core.compat.tensorrt_llm.bindings import DataType, DecodingInput, DecodingMode, DecodingOutput, GptDecoder
from trtllm_core.compat.tensorrt_llm.bindings import SamplingConfig as ClassicConfig
from trtllm_core.config import BuildConfig
from trtllm_core.errors import CapacityError, ConfigError, PluginContractError, PluginRuntimeError
from trtllm_core.plugin import (
    Decoder,
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    LogitsCapabilities,
    Selection,
    hookimpl,
)
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.markov import MarkovExecutable

VOCAB = 31
BUILD = BuildConfig(
    max_batch_size=12, max_beam_width=2, max_input_len=40, max_seq_len=64, max_num_tokens=40, tokens_per_block=4
)
ASK = SamplingConfig(max_new_tokens=12, end_id=(), return_dict=True)
NEGATIVE = [(7, 8, 9), (3,)]
"""What ``guide`` has run beside a request, in this order."""
TAKEN = [0.5, 0.25]


class Guide(DeviceLogitsProcessor):
    """Takes away a part of what each companion likes."""

    capabilities = LogitsCapabilities(speculation="rewind")

    def companions(self, view):
        return NEGATIVE

    def apply(self, logits, batch):
        if batch.companion_logits is None:  # none of its requests asks for a token
            assert not batch.active.any()
            return
        for j, part in enumerate(TAKEN):
            taken = part * batch.companion_logits[batch.companions[:, j]]
            logits -= torch.where(batch.active.unsqueeze(1), taken, 0.0)


class HostGuide(HostLogitsProcessor):
    def companions(self, view):
        return NEGATIVE

    def process_beside(self, state, tokens, logits, companions):
        logits -= torch.tensor(TAKEN) @ companions


class Another(DeviceLogitsProcessor):
    """Has one companion of its own, after ``guide``."""

    after = ("guide",)

    def companions(self, view):
        return [view.prompt[-1:]]

    def apply(self, logits, batch):
        if batch.companion_logits is None:
            return
        taken = 0.75 * batch.companion_logits[batch.companions[:, 0]]
        logits -= torch.where(batch.active.unsqueeze(1), taken, 0.0)


class Fails(Guide):
    """After the third token of a request."""

    def apply(self, logits, batch):
        if (batch.context.lengths[batch.slot] - batch.context.prompt_lengths[batch.slot] > 2)[batch.active].any():
            raise RuntimeError("enough")
        super().apply(logits, batch)


class Asks(Guide):
    """For what it is told to."""

    answer: Any = None

    def companions(self, view):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class LooksAhead(Decoder):
    """Has logits of its own processed, which no engine gave."""

    def select(self, logits, batch):
        self.host.process(torch.zeros_like(logits), batch)
        return Selection(logits.argmax(1, keepdim=True), torch.ones_like(batch.slot))


class Here:
    hook_api = ("logits_processor>=1.0,<2", "decoder>=1.0,<2")

    @hookimpl
    def trtllm_register_logits_processors(self, registrar):
        for name, cls in (("guide", Guide), ("host_guide", HostGuide), ("another", Another), ("fails", Fails)):
            registrar.add(name, cls)

    @hookimpl
    def trtllm_register_decoders(self, registrar):
        registrar.add("looks_ahead", LooksAhead)


class Joins:
    """Is in the plan of who sets a penalty."""

    hook_api = "logits_processor>=1.0,<2"

    @hookimpl
    def trtllm_register_logits_processors(self, registrar):
        registrar.add("joins", Guide, consumes={"presence_penalty": 0.0})


class Steps:
    """Watches."""

    hook_api = "observer>=1.0,<2"

    def __init__(self):
        self.seen = []

    @hookimpl
    def trtllm_on_step_end(self, stats):
        self.seen.append(stats)


class Ends:
    hook_api = "observer>=1.0,<2"

    def __init__(self):
        self.seen = []

    @hookimpl
    def trtllm_on_request_end(self, stats):
        self.seen.append(stats)


def made(cache: KVCacheConfig | None = None, build: BuildConfig = BUILD, *more: Any) -> ModelRunner:
    """A model whose logits depend on the whole text, as the cache has it."""
    engine = MarkovExecutable(VOCAB, seed=3, build=build, remembers=True)
    return ModelRunner.from_engine(engine, plugins=Plugins.load(extra=[Here(), *more]), kv_cache=cache)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return made()


def own(runner: ModelRunner, text: Sequence[int]) -> torch.Tensor:
    engine = runner.session.engine
    return engine.table[engine.state_of(torch.tensor(text))[-1]]


def guided(runner: ModelRunner, prompt: Sequence[int], new: Sequence[int], another: bool = False) -> torch.Tensor:
    """The logits of one text, one companion after the other."""
    beside = [*zip(TAKEN, NEGATIVE, strict=True), *([(0.75, prompt[-1:])] if another else [])]
    return own(runner, [*prompt, *new]) - sum(part * own(runner, [*other, *new]) for part, other in beside)


def greedy(runner: ModelRunner, prompt: Sequence[int], count: int = 12, another: bool = False) -> tuple[int, ...]:
    new: list[int] = []
    for _ in range(count):
        new.append(int(guided(runner, prompt, new, another).argmax()))
    return tuple(new)


def tokens(runner: ModelRunner, prompts: Sequence[Sequence[int]], *args: Any, **fields: Any) -> list[tuple[int, ...]]:
    outputs = runner.generate(prompts, *args, **fields)["outputs"]
    for output in outputs:
        assert output.error is None, output.error
    assert idle(runner)
    return [output.tokens for output in outputs]


def idle(runner: ModelRunner) -> bool:
    """Nothing is left of anybody."""
    loop = runner.generation.loop
    loop.cache.policy.check_integrity()
    table = loop.branches
    assert not table.owners
    assert not table.live
    assert not table.companions
    assert not table.companions.here.any()
    return table.slots.free == BUILD.max_branches


def prompts(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))] for _ in range(count)]


@pytest.mark.parametrize("name", ["guide", "host_guide"])
def test_the_processor_sees_what_its_companions_are_given(runner, name):
    """Alone and beside requests without any; the prompts take several steps, and their ends come together."""
    given = prompts(1, 6)
    ask = ASK.replace(logits_processors=use(name))
    plain = tokens(runner, given, ASK)
    assert tokens(runner, given[:1], ask) == [greedy(runner, given[0])]
    found = tokens(runner, given, [ask, ASK, ask, ask, ASK, ask])
    due = [greedy(runner, prompt) for prompt in given]
    assert found == [due[0], plain[1], due[2], due[3], plain[4], due[5]]
    assert found != plain


def test_each_processor_sees_its_own(runner):
    given = prompts(2, 3)
    both = ASK.replace(logits_processors=(use("another"), use("guide")))
    one = ASK.replace(logits_processors=use("guide"))
    found = tokens(runner, given, [both, one, both])
    assert found == [greedy(runner, p, another=i != 1) for i, p in enumerate(given)]


def test_several_answers_have_companions_of_their_own(runner):
    ask = ASK.replace(
        logits_processors=use("guide"), top_k=0, top_p=1.0, num_return_sequences=3, random_seed=4, output_log_probs=True
    )
    outputs = runner.generate([[5, 6, 7, 1, 2]], ask)["outputs"]
    assert len({output.tokens for output in outputs}) == 3
    for output in outputs:
        for at, (token, chance) in enumerate(zip(output.tokens, output.log_probs, strict=True)):
            row = guided(runner, [5, 6, 7, 1, 2], output.tokens[:at])
            assert chance == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-3)
    assert idle(runner)


@pytest.mark.parametrize("preset", ["trtllm", "hf"])
def test_beams_fork_their_companions(runner, preset):
    """Against a plain search over the guided logits."""
    prompt, width, count = [5, 6, 7, 1, 2], 2, 8
    beams = [((), 0.0)]
    for _ in range(count):
        rows = [guided(runner, prompt, b) for b, _ in beams]
        if preset == "hf":  # there the logits become log-probabilities first, and are what processors make of them
            rows = [row - own(runner, [*prompt, *b]).logsumexp(-1) for row, (b, _) in zip(rows, beams, strict=True)]
        else:
            rows = [row.log_softmax(-1) for row in rows]
        steps = [(b, s, row) for row, (b, s) in zip(rows, beams, strict=True)]
        more = [((*b, t), s + float(row[t])) for b, s, row in steps for t in range(VOCAB)]
        beams = sorted(more, key=lambda one: -one[1])[:width]
    ask = ASK.replace(logits_processors=use("guide"), num_beams=width, preset=preset, max_new_tokens=count)
    assert tokens(runner, [prompt, [4]], [ask.replace(num_return_sequences=1), ASK])[0] == beams[0][0]


def contrastive(runner: ModelRunner, prompt: Sequence[int], count: int, top_k: int, alpha: float) -> tuple[int, ...]:
    """By its formula: p is the guided distribution, and states are those of the text itself."""
    engine, text = runner.session.engine, list(prompt)
    for _ in range(count):
        chances = guided(runner, prompt, text[len(prompt) :]).softmax(0)
        states = engine.states[engine.state_of(torch.tensor(text))]
        scores = {}
        for token in chances.argsort(descending=True, stable=True)[:top_k].tolist():
            state = engine.states[engine.state_of(torch.tensor([*text, token]))[-1]]
            alike = max(float(torch.cosine_similarity(state, other, dim=0)) for other in states)
            scores[token] = (1 - alpha) * float(chances[token]) - alpha * alike
        text.append(max(scores, key=lambda token: scores[token]))
    return tuple(text[len(prompt) :])


@pytest.mark.parametrize("cache", [None, KVCacheConfig(max_tokens=232, options={"admission": "optimistic"})])
def test_a_contrastive_search_is_guided(cache):
    """Beside requests of other kinds, and where its candidates find no room."""
    runner = made(cache, BUILD.replace(max_batch_size=12, max_beam_width=4, max_num_tokens=60))
    ask = ASK.replace(logits_processors=use("guide"), decoder=use("contrastive_search", top_k=3, penalty_alpha=0.5))
    given = [[5, 6, 7, 1, 2], [4], [9, 8, 7], [11, 12], [3] * 9]
    outputs = runner.generate(given, [ask, ASK, ASK.replace(logits_processors=use("guide")), ask, ask])["outputs"]
    due = [contrastive(runner, given[i], 12, 3, 0.5) for i in (0, 3, 4)]
    assert [outputs[i].tokens for i in (0, 3, 4)] == due
    assert due[0] != greedy(runner, given[0])
    assert outputs[2].tokens == greedy(runner, given[2])
    assert (sum(one.preemptions for one in outputs) > 0) is (cache is not None)
    assert runner.generation.loop.branches.slots.free == 48
    runner.generation.loop.cache.policy.check_integrity()


@pytest.mark.parametrize("policy", ["paged", "prefix"])
def test_they_are_put_off_with_their_owners(policy):
    """A pool that cannot hold all: requests come back and compute their text, and their companions', anew."""
    ends = Ends()
    cache = KVCacheConfig(policy=policy, max_tokens=200, options={"admission": "optimistic"})
    runner = made(cache, BUILD.replace(max_num_tokens=24), ends)
    given = prompts(3, 5)
    ask = ASK.replace(logits_processors=use("guide"), max_new_tokens=30)
    found = tokens(runner, given, ask)
    assert found == [greedy(runner, prompt, 30) for prompt in given]
    assert sum(request.preemptions for request in ends.seen) > 1


@pytest.mark.parametrize("policy", ["paged", "prefix", "contiguous"])
def test_put_off_at_any_time(policy, monkeypatch):
    """Between any two steps, prompts that are half read included: several answers, beams, and who has none."""
    guide = ASK.replace(logits_processors=use("guide"))
    several = guide.replace(top_k=0, top_p=1.0, num_return_sequences=2, random_seed=4)
    asks = [guide, several, ASK, guide.replace(num_beams=2, num_return_sequences=1)]
    given = prompts(7, 4)
    build = BUILD.replace(max_num_tokens=24)
    due = tokens(made(None, build), given, asks)
    draw, reserve, count = random.Random(5), Scheduler._reserve, 0

    def disturb(self):
        nonlocal count
        for one in [*self._running]:
            if len(self._running) > 1 and draw.random() < 0.15:
                self._running.leave(one)
                self._put_off(one)
                count += 1
        self._room.forget()
        return reserve(self)

    monkeypatch.setattr(Scheduler, "_reserve", disturb)
    assert tokens(made(KVCacheConfig(policy=policy), build), given, asks) == due
    assert count > 5


def test_in_flight_and_under_the_smallest_budget():
    runner = made()
    given = prompts(8, 4)
    asks = [ASK.replace(logits_processors=use("guide"), return_dict=False), ASK.replace(return_dict=False)] * 2
    with Executor(runner, ExecutorConfig(max_num_tokens=BUILD.max_branches)) as executor:
        handles = [executor.submit(prompt, ask) for prompt, ask in zip(given, asks, strict=True)]
        gone = executor.submit(given[0], asks[0].replace(max_new_tokens=30))
        gone.cancel()
        found = [handle.result(timeout=60)[0].tokens for handle in handles]
        assert gone.result(timeout=60)[0].finish_reason == "cancelled"
    assert found[::2] == [greedy(runner, prompt) for prompt in given[::2]]
    assert idle(runner)


def test_a_decoder_has_no_companions_for_logits_of_its_own(runner):
    one, other = runner.generate(
        [[1, 2], [3]], [ASK.replace(decoder=use("looks_ahead"), logits_processors=use("guide")), ASK]
    )["outputs"]
    assert (one.finish_reason, other.finish_reason) == ("plugin_error", "length")
    assert "they have none for it" in str(one.error)
    assert idle(runner)


def test_logits_that_are_given_have_no_companions():
    """``GptDecoder`` runs no engine."""
    plugins = Plugins.load(extra=[Joins()])
    decoder = GptDecoder(DecodingMode.TOP_K_TOP_P, DataType.FLOAT, 2, 1, VOCAB, VOCAB, 32, plugins=plugins)
    output = DecodingOutput(torch.zeros(1, 1, 32, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int32))
    given = DecodingInput(torch.zeros(1, 1, VOCAB), torch.tensor([-1]))
    decoder.setup(ClassicConfig(presence_penalty=[0.5]), 1)
    with pytest.raises(ConfigError, match="plugin 'joins' needs companions, which this session cannot"):
        decoder.forward(output, given)
    decoder.setup(ClassicConfig(), 1)
    decoder.forward(output, given)


def test_their_prompts_are_reused():
    steps = Steps()
    runner = made(KVCacheConfig(policy="prefix"), BUILD, steps)
    before, long = NEGATIVE[:], tuple(range(1, 25))
    NEGATIVE[0] = long
    try:
        ask = ASK.replace(logits_processors=use("guide"), max_new_tokens=2)
        first = tokens(runner, [[5, 6]], ask)
        cost = sum(step.companion_tokens for step in steps.seen)
        steps.seen.clear()
        assert tokens(runner, [[9, 9]], ask) == [greedy(runner, [9, 9], 2)]
        assert sum(step.companion_tokens for step in steps.seen) <= cost - 20
        assert first == [greedy(runner, [5, 6], 2)]
    finally:
        NEGATIVE[:] = before


def test_statistics_and_streams_do_not_know_them():
    steps = Steps()
    runner = made(None, BUILD, steps)
    given = [[5, 6, 7], [1, 2]]
    told = list(runner.generate(given, ASK.replace(logits_processors=use("guide"), max_new_tokens=4), streaming=True))
    assert {(delta.request_id, delta.sequence) for delta in told} == {("0", 0), ("1", 0)}
    assert sum(len(delta.tokens) for delta in told) == 8
    assert sum(step.context_tokens for step in steps.seen) == 5
    assert sum(step.generation_tokens for step in steps.seen) == 6
    assert max(step.rows for step in steps.seen) == 2
    assert sum(step.companion_tokens for step in steps.seen) == 2 * (4 + 3 + 3)


def test_whoever_fails_or_stops_iterating_leaves_nothing(runner):
    given = prompts(4, 3)
    ask = ASK.replace(logits_processors=use("fails"))
    outputs = runner.generate(given, [ask, ASK, ASK.replace(logits_processors=use("guide"))])["outputs"]
    assert [output.finish_reason for output in outputs] == ["plugin_error", "length", "length"]
    assert outputs[0].tokens == greedy(runner, given[0], 3)
    assert outputs[2].tokens == greedy(runner, given[2])
    assert idle(runner)
    stream = runner.generate(given, ASK.replace(logits_processors=use("guide")), streaming=True)
    next(iter(stream))
    stream.close()
    assert idle(runner)


def test_a_branch_that_ends_early_frees_its_companions(runner):
    given = prompts(5, 4)
    due = [greedy(runner, prompt) for prompt in given]
    ask = ASK.replace(logits_processors=use("guide"))
    found = tokens(runner, given, [ask.replace(end_id=(one[4],)) for one in due])
    assert found == [one[: one.index(one[4]) + 1] for one in due]


def test_requests_wait_for_slots(runner):
    """24 slots hold 8 requests with two companions each."""
    given = prompts(6, 12)
    found = tokens(runner, given, ASK.replace(logits_processors=use("guide")))
    assert found == [greedy(runner, prompt) for prompt in given]


def test_drafts_are_lowered_and_said(runner):
    ask = ASK.replace(logits_processors=use("guide"), decoder=use("ngram"))
    plan = runner.explain(ask)
    assert plan.positions == 1
    assert "ngram: one token a step, because 'guide' cannot take part in verifying several" in plan.notes
    other = ASK.replace(decoder=use("ngram"))
    given = [[1, 2, 3, 1, 2, 3, 1, 2], [4, 5, 4, 5, 4]]
    assert tokens(runner, given, [ask, other]) == [greedy(runner, given[0]), tokens(runner, given[1:], ASK)[0]]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ([[]], PluginContractError, "'Asks' asked for a companion without a single token"),
        ([[VOCAB]], PluginContractError, f"token id {VOCAB}, outside the vocabulary of {VOCAB}"),
        ([[-1, 2]], PluginContractError, "token id -1"),
        (5, PluginContractError, "returned 5 from companions"),
        ([[1] * 41], CapacityError, "a companion of 'Asks' has 41 tokens and gets up to 12 new ones"),
        (
            [[1]] * 24,
            CapacityError,
            "25 slots, 24 beside each of 1 for the companions of 'Asks', but the engine has 24",
        ),
        (ConfigError("not with me"), ConfigError, "not with me"),
        (ValueError("oh"), PluginRuntimeError, "'Asks' raised ValueError: oh"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_token(runner, answer, error, words):
    calls = runner.session.engine.calls
    processor = Asks()
    processor.answer = answer
    with pytest.raises(error, match=words):
        runner.generate([[1, 2], [3]], ASK, logits_processor=[processor])
    assert runner.session.engine.calls == calls
    assert idle(runner)


def test_a_pool_that_is_too_small_is_refused():
    runner = made(KVCacheConfig(max_tokens=48))
    with pytest.raises(CapacityError, match="1 branches of 2 .*, with 2 companions each, need 13 blocks"):
        runner.generate([[1, 2]], ASK.replace(logits_processors=use("guide"), max_new_tokens=14))


def test_explain_tells_of_them(runner, capsys):
    ask = ASK.replace(logits_processors=(use("another"), use("guide")))
    plan = runner.generation.loop.branches.planner.plan(ask, prompt=[4, 5])
    assert explain.plan_record(plan, ask)["companions"] == {"guide": 2, "another": 1}
    explain._print_fields(plan, ask)
    assert "guide: 2 beside each branch, a slot each, with the same tokens" in " ".join(capsys.readouterr().out.split())
