"""Verify steps: drafts change how many steps a text takes, and never the text."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from trtllm_core import KVCacheConfig, ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.config import BuildConfig
from trtllm_core.decoding.ngram import NGram, NGramParams
from trtllm_core.decoding.samplers import TopKTopP
from trtllm_core.errors import BranchError, ConfigError, PluginContractError, PluginRuntimeError
from trtllm_core.plugin import (
    BranchPlan,
    BranchView,
    Decoder,
    DecoderCapabilities,
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    HostStoppingCriterion,
    LogitsCapabilities,
    Proposal,
    Selection,
    Stop,
    StoppingCapabilities,
    hookimpl,
)
from trtllm_core.testing.letters import letter_tokenizer
from trtllm_core.testing.markov import MarkovExecutable

VOCAB = 29
BUILD = BuildConfig(max_batch_size=8, max_input_len=64, max_seq_len=96, tokens_per_block=4)
NGRAM = use("ngram", tokens=5)


class Oracle(Decoder):
    """Proposes what the model would say, but for every ``wrong``-th token, by looking at its table."""

    capabilities = DecoderCapabilities(needs=frozenset({"sampler"}))
    executable: MarkovExecutable
    wrong = 3

    def setup(self, context):
        self.context = context

    def plan(self, view):
        count = view.sampling.num_return_sequences
        return BranchPlan(count, count, 5, count)

    def propose(self, batch):
        rows = []
        for slot in batch.slot.tolist():
            text = batch.context.tokens[slot, : batch.context.lengths[slot]].tolist()
            for _ in range(4):
                token = int(self.executable.table[self.executable.state_of(torch.tensor(text))[-1]].argmax())
                text.append((token + 1) % VOCAB if len(text) % self.wrong == 0 else token)
            rows.append(text[-4:])
        return Proposal(torch.tensor(rows), torch.full((len(rows),), 4))

    def select(self, logits, batch):
        tokens = self.host.sample(logits, batch)
        if batch.starts is None:
            return Selection(tokens[:, None], torch.ones_like(batch.slot))
        ends = [*batch.starts[1:].tolist(), len(tokens)]
        rows, counts = torch.zeros(len(ends), 5, dtype=torch.int64), []
        for row, (start, end) in enumerate(zip(batch.starts.tolist(), ends, strict=True)):
            taken, draft = tokens[start:end].tolist(), batch.draft[batch.slot[start], : end - start - 1].tolist()
            count = next((i for i, (a, b) in enumerate(zip(taken, draft, strict=False)) if a != b), len(draft)) + 1
            rows[row, : end - start] = tokens[start:end]
            counts.append(count)
        return Selection(rows, torch.tensor(counts))


class Liar(Oracle):
    def propose(self, batch):
        return Proposal(torch.full((len(batch.slot), 2), VOCAB), torch.full((len(batch.slot),), 2))


class Miscounts(Oracle):
    def propose(self, batch):
        return Proposal(torch.zeros(len(batch.slot), 2, dtype=torch.int64), torch.full((len(batch.slot),), 3))


class Misshaped(Oracle):
    def propose(self, batch):
        return Proposal(torch.zeros(1, 2), torch.zeros(9))


class NoProposal(Oracle):
    def propose(self, batch):
        return [1]


class ProposeRaises(Oracle):
    def propose(self, batch):
        raise ValueError("propose")


BAD = {
    Liar: (PluginContractError, r"proposed 2 of 2 tokens, \[29, 29\]"),
    Miscounts: (PluginContractError, "proposed 3 of 2 tokens"),
    Misshaped: (PluginContractError, r"proposed tokens \[1, 2\]"),
    NoProposal: (PluginContractError, "returned a list from propose"),
    ProposeRaises: (PluginRuntimeError, "'ProposeRaises' raised ValueError: propose"),
}


class NoSpeculation(DeviceLogitsProcessor):
    def apply(self, logits, batch):
        return None


class NoSpeculationStop(HostStoppingCriterion):
    capabilities = StoppingCapabilities(speculation="none")

    def check(self, state, tokens, new):
        return None


class Extra:
    hook_api = ("decoder>=1.1,<2", "logits_processor>=1.0,<2")

    @hookimpl
    def trtllm_register_decoders(self, registrar):
        for cls in (Oracle, *BAD):
            registrar.add(cls.__name__, cls, consumes=("num_return_sequences",))

    @hookimpl
    def trtllm_register_logits_processors(self, registrar):
        registrar.add("no_speculation", NoSpeculation)


def make(build=BUILD, **options) -> ModelRunner:
    executable = MarkovExecutable(VOCAB, seed=5, build=build, remembers=True)
    Oracle.executable = executable
    tokenizer = letter_tokenizer(VOCAB)
    return ModelRunner.from_engine(executable, plugins=Plugins.load(extra=[Extra()]), tokenizer=tokenizer, **options)


@pytest.fixture
def runner() -> ModelRunner:
    return make()


def assert_nothing_is_lost(runner):
    loop = runner.generation.loop
    assert (loop.branches.slots.free, loop.branches.live, loop.branches.verifying) == (8, {}, set())
    usage = loop.cache.usage()
    assert usage.free == usage.total
    loop.cache.policy.check_integrity()


GREEDY = SamplingConfig(end_id=(), max_new_tokens=24, return_dict=True)
DRAWS = GREEDY.replace(top_k=0, top_p=0.9, temperature=0.4, random_seed=11)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Short, and made of few tokens, so that there is something to look up."""
    rng = random.Random(seed)
    return [[rng.randrange(4) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def both(runner, texts, config, decoder, **objects):
    """Outputs without and with drafts, which must be alike, and the latter's executions of the engine."""
    plain = runner.generate(texts, config, text=True, **objects)["outputs"]
    before = runner.session.engine.calls
    drafted = runner.generate(texts, config.replace(decoder=decoder), text=True, **objects)["outputs"]
    for one, other in zip(plain, drafted, strict=True):
        assert one.tokens == other.tokens
        assert (one.finish_reason, one.text, one.length) == (other.finish_reason, other.text, other.length)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        assert one.matched == other.matched
    assert_nothing_is_lost(runner)
    return drafted, runner.session.engine.calls - before


# -- the text stays the same ------------------------------------------------------------------------------------------


def test_greedy_text_is_the_same_for_200_prompts(runner):
    texts = prompts(200)
    for start in range(0, 200, 8):
        both(runner, texts[start : start + 8], GREEDY.replace(max_new_tokens=12), NGRAM)


@pytest.mark.parametrize("decoder", [NGRAM, "Oracle"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"output_log_probs": True},
        {
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.3,
            "no_repeat_ngram_size": 4,
            "bad_words_list": [[3], [1, 2]],
        },
        {"min_length": 9, "end_id": (0, 1, 2)},
        {"stop_words_list": [[3], [7, 1]]},
        {"stop_strings": ["hab", "cb"]},
        {"num_return_sequences": 2},
    ],
)
def test_everything_that_a_request_may_ask_for_stays_the_same(runner, decoder, fields):
    if "num_return_sequences" in fields:
        fields, texts = fields | {"top_k": 0, "top_p": 0.9, "random_seed": 3}, prompts(3, 1)
    else:
        texts = prompts(6, 1)
    both(runner, texts, GREEDY.replace(**fields), decoder)
    both(runner, texts, DRAWS.replace(**fields), decoder)


def test_top_p_that_decays_stays_the_same(runner):
    both(runner, prompts(6), DRAWS.replace(top_p_decay=0.8, top_p_min=0.1, top_p_reset_ids=3), "Oracle")


@pytest.mark.parametrize("policy", ["paged", "contiguous", "prefix"])
def test_accepted_drafts_save_steps(policy):
    runner = make(kv_cache=KVCacheConfig(policy=policy))
    drafted, steps = both(runner, prompts(4, 2), GREEDY, "Oracle")
    assert steps <= 1 + 24 / 2.5, "of three drafts two are right"
    for one in drafted:
        assert one.drafted_tokens > one.accepted_tokens >= 12
        assert one.accepted_tokens + steps >= 24


def test_ngram_finds_what_repeats(runner):
    """A text that goes round in circles is looked up whole."""
    texts = [[1, 2, 3, 4, 5, 6, 7, 8] * 3]

    class Round(HostLogitsProcessor):
        capabilities = LogitsCapabilities(speculation="per_position")

        def process(self, state, tokens, logits):
            logits[tokens[-1] % 8 + 1] += 100

    both(runner, texts, GREEDY, use("ngram", tokens=7), logits_processor=Round())
    before = runner.session.engine.calls
    out = runner.generate(texts, GREEDY, decoder=use("ngram", tokens=7), logits_processor=Round())["outputs"][0]
    assert runner.session.engine.calls - before == 1 + 3, "the prompt, and eight tokens a step"
    assert out.accepted_tokens == out.drafted_tokens == 20


def test_proposals_are_the_longest_and_latest_match(new_floor):
    floor = new_floor(slots=3, vocab=50, padded=50, max_seq_len=40)
    decoder = NGram()
    decoder.setup(floor.context)
    texts = ([1, 2, 3, 9, 7, 3, 8, 1, 2, 3], [1, 2, 3, 4], [5, 6, 5, 7, 5])
    for slot, text in enumerate(texts):
        floor.view(slot, text)
        decoder.begin(slot, BranchView("r", 0, slot, text, GREEDY, (), 0, NGramParams(tokens=3 - slot % 2)))
    proposal = decoder.propose(floor.logits_batch([0, 1, 2]))
    drafts = [row[:count] for row, count in zip(proposal.tokens.tolist(), proposal.counts.tolist(), strict=True)]
    assert drafts == [[9, 7, 3], [], [7, 5]]


# -- budgets, ends, company -------------------------------------------------------------------------------------------


def test_drafts_fit_into_the_budget_of_a_step():
    tight = BuildConfig(max_batch_size=8, max_input_len=64, max_seq_len=96, max_num_tokens=11, tokens_per_block=4)
    runner = make(tight)
    most = []
    execute = runner.session.engine.execute

    def watch(inputs, outputs, stream):
        most.append(len(inputs["input_ids"]))
        execute(inputs, outputs, stream)

    runner.session.engine.execute = watch
    both(runner, prompts(8), GREEDY, "Oracle")
    assert max(most) == 11


def test_beside_requests_that_do_not_draft(runner):
    texts = prompts(6, 4)
    plain = [GREEDY, DRAWS, GREEDY.replace(repetition_penalty=1.3), DRAWS.replace(output_log_probs=True), GREEDY, DRAWS]
    expected = runner.generate(texts, plain)["outputs"]
    mixed = [plain[0].replace(decoder="Oracle"), *plain[1:3], plain[3].replace(decoder=NGRAM), plain[4], plain[5]]
    got = runner.generate(texts, mixed)["outputs"]
    assert [one.tokens for one in got] == [one.tokens for one in expected]
    assert got[3].log_probs == pytest.approx(expected[3].log_probs, abs=1e-5)


def test_beside_a_search():
    build = BuildConfig(max_batch_size=4, max_beam_width=2, max_input_len=64, max_seq_len=96, tokens_per_block=4)
    runner = make(build)
    texts = prompts(3, 4)
    configs = [GREEDY, SamplingConfig(num_beams=2, end_id=(3,), max_new_tokens=24, output_log_probs=True), DRAWS]
    expected = runner.generate(texts, configs)["outputs"]
    mixed = [configs[0].replace(decoder="Oracle"), configs[1], configs[2].replace(decoder="Oracle")]
    got = runner.generate(texts, mixed)["outputs"]
    assert [one.tokens for one in got] == [one.tokens for one in expected]
    assert got[1].log_probs == pytest.approx(expected[1].log_probs, abs=1e-5)


def test_a_stop_inside_a_draft_cuts_there(runner):
    """The third of five tokens that a step accepts stops the text: no later one is seen by anybody."""
    text = prompts(1, 7)
    free = runner.generate(text, GREEDY)["outputs"][0].tokens

    class Third(HostStoppingCriterion):
        def check(self, state, tokens, new):
            at = len(text[0]) + 3 - len(tokens) - 1
            return Stop("third", at) if 0 <= at < len(new) else None

    class Watches(HostLogitsProcessor):
        capabilities = LogitsCapabilities(speculation="per_position")

        def __init__(self):
            self.told = []

        def process(self, state, tokens, logits):
            pass

        def accept(self, state, tokens):
            if state is None:  # not a copy for drafts
                self.told.extend(tokens)
            return state

        def copy(self, state):
            return "copy"

    Oracle.wrong, watches = 1000, Watches()
    try:
        config = GREEDY.replace(decoder="Oracle")
        deltas = list(
            runner.generate(text, config, streaming=True, stopping_criteria=Third(), logits_processor=watches)
        )
    finally:
        Oracle.wrong = 3
    assert sum((delta.tokens for delta in deltas), ()) == free[:3] == tuple(watches.told)
    assert [len(delta.tokens) for delta in deltas] == [1, 2]
    assert deltas[-1].finish_reason == "third"
    assert_nothing_is_lost(runner)


# -- constraints ------------------------------------------------------------------------------------------------------


class Alternates(HostLogitsProcessor):
    """A small grammar: an even token, then two odd ones, and so on. It counts what it accepted."""

    capabilities = LogitsCapabilities(speculation="rewind")

    def start(self, view):
        return 0

    def mask(self, state, tokens, words):
        odd = 0xAAAAAAAA
        words.view("uint32")[:] = odd if state % 3 else ~np.uint32(odd)
        return True

    def accept(self, state, tokens):
        for token in tokens:
            if token % 2 != (state % 3 > 0):
                raise AssertionError("a token that the mask forbids")
            state += 1
        return state


class Refuses(Alternates):
    """As grammars do: a draft that it forbids is refused, and what follows it is never asked for."""

    def accept(self, state, tokens):
        try:
            return super().accept(state, tokens)
        except AssertionError as error:
            raise BranchError("refused") from error


@pytest.mark.parametrize("decoder", [NGRAM, "Oracle"])
def test_drafts_under_a_constraint_with_a_stop_in_mid_draft(runner, decoder):
    """N-gram speculation, a grammar, and a stop inside of what a step accepts: all of it together."""
    texts = prompts(8, 9)
    for config in (GREEDY, DRAWS):
        out, _ = both(runner, texts, config, decoder, logits_processor=Refuses())
        for one in out:
            assert all(token % 2 == (place % 3 > 0) for place, token in enumerate(one.tokens))
        words = [list(one.tokens[10:12]) for one in out[:4]]
        stopping = config.replace(stop_words_list=words, stop_strings=["hb"])
        stopped, _ = both(runner, texts, stopping, decoder, logits_processor=Refuses())
        assert {one.finish_reason for one in stopped} & {"stop_words", "stop_string"}


class Template(HostLogitsProcessor):
    """Free tokens in between, and six that are known beforehand after every third."""

    capabilities = LogitsCapabilities(speculation="rewind")
    FORCED = (4, 8, 15, 16, 23, 4)

    def start(self, view):
        return 0

    def forced(self, state):
        return self.FORCED[state % 9 - 3 :] if state % 9 >= 3 else ()

    def mask(self, state, tokens, words):
        known = self.forced(state)
        if known:
            words[:] = 0
            words.view("uint32")[known[0] // 32] = 1 << known[0] % 32
        return bool(known)

    def accept(self, state, tokens):
        return state + len(tokens)


@pytest.mark.parametrize("config", [GREEDY, DRAWS])
def test_tokens_that_a_processor_forces_are_jumped_over(runner, config):
    class Slowly(Template):
        capabilities = LogitsCapabilities(speculation="none")

    texts = prompts(3, 3)
    slow = runner.generate(texts, config, logits_processor=Slowly())["outputs"]
    before = runner.session.engine.calls
    fast = runner.generate(texts, config, logits_processor=Template())["outputs"]
    steps = runner.session.engine.calls - before
    assert [one.tokens for one in fast] == [one.tokens for one in slow]
    assert all(one.tokens[3:9] == Template.FORCED for one in fast)
    assert steps < 12, "24 tokens, of which 15 are known"
    assert_nothing_is_lost(runner)


# -- what cannot take part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "objects", "name"),
    [
        ({"logits_processors": "no_speculation"}, {}, "no_speculation"),
        ({}, {"criteria": [NoSpeculationStop()]}, "NoSpeculationStop"),
    ],
)
def test_what_cannot_take_part_lowers_a_request_to_one_token_a_step(runner, fields, objects, name):
    config = GREEDY.replace(decoder=NGRAM, **fields)
    plan = runner.generation.loop.branches.planner.plan(config, **objects)
    assert plan.positions == 1
    assert plan.notes[-1] == f"ngram: one token a step, because '{name}' cannot take part in verifying several"
    before = runner.session.engine.calls
    runner.generate(prompts(1), config, stopping_criteria=objects.get("criteria"))
    assert runner.session.engine.calls - before == 24


def test_a_backend_that_cannot_verify_refuses(monkeypatch):
    runner = make()
    runner.generation.loop.branches.planner.offers -= {"multi_position"}
    with pytest.raises(ConfigError, match="'ngram' needs 'multi_position'"):
        runner.generate(prompts(1), GREEDY.replace(decoder=NGRAM))


def test_a_ring_that_cannot_be_rewound_refuses():
    ring = KVCacheConfig(options={"max_attention_window": 16})
    executable = MarkovExecutable(VOCAB, build=BUILD)
    runner = ModelRunner.from_engine(executable, kv_cache=ring)
    with pytest.raises(ConfigError, match="'ngram' needs 'kv_rewind'"):
        runner.generate(prompts(1), GREEDY.replace(decoder=NGRAM))


@pytest.mark.parametrize("decoder", BAD)
def test_a_proposal_that_breaks_the_contract_fails_alone(runner, decoder):
    expected = runner.generate([[3]], GREEDY)["outputs"][0].tokens
    good, bad = runner.generate([[3], [5]], [GREEDY, GREEDY.replace(decoder=decoder.__name__)])["outputs"]
    assert good.tokens == expected
    assert bad.finish_reason == "plugin_error"
    error, words = BAD[decoder]
    with pytest.raises(error, match=words):
        raise bad.error
    assert_nothing_is_lost(runner)


@pytest.mark.parametrize("params", [{"tokens": 0}, {"longest": 2, "shortest": 3}, {"token": 3}])
def test_parameters_are_checked(runner, params):
    with pytest.raises(ConfigError, match="ngram"):
        runner.explain(GREEDY.replace(decoder=use("ngram", **params)))


# -- the samplers' distributions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "p"), [(1, 0.0), (0, 0.0), (3, 0.0), (3, 0.5), (0, 0.5), (0, 1.0), (100, 0.7)])
def test_distribution_is_that_of_the_reference(new_floor, reference, rng, k, p):
    floor = new_floor(slots=1, vocab=12, padded=12)
    x = rng.normal(size=12).astype(np.float32) * 2
    sampler = TopKTopP()
    sampler.setup(floor.context)
    sampler.begin(0, floor.view(0, [1], top_k=k, top_p=p))
    got = sampler.distribution(torch.from_numpy(x.copy())[None], floor.logits_batch([0]))[0]
    np.testing.assert_allclose(got.numpy(), reference.distribution(x, k, p), atol=1e-6)
