"""Requests with several branches: many answers to a prompt, and searches that fork, finish and revise."""

from __future__ import annotations

import pytest
import torch

from trtllm_core import ModelRunner, Plugins, SamplingConfig
from trtllm_core.batch_input import make_requests
from trtllm_core.config import BuildConfig, KVCacheConfig
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.errors import CapacityError, PluginContractError
from trtllm_core.kv_cache import PrefixPolicy
from trtllm_core.plugin import (
    BranchPlan,
    Candidates,
    Decoder,
    DeviceLogitsProcessor,
    DeviceStoppingCriterion,
    HostLogitsProcessor,
    HostStoppingCriterion,
    Hypothesis,
    Selection,
    Stop,
    Survivors,
    hookimpl,
)
from trtllm_core.testing.markov import MarkovExecutable

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
"""One block and a bit."""
DRAWS = SamplingConfig(top_k=0, top_p=1.0, random_seed=7, end_id=(), max_new_tokens=20, return_dict=True)


class Spread(Decoder):
    """Starts with the three likeliest tokens, then permutes its branches in a cycle each step, each greedily. Slot i
    takes over slot i + 1, of as many as ``width`` says."""

    width = 3

    def setup(self, context):
        self.slots, self.prompts = {}, {}

    def plan(self, view):
        return BranchPlan(branches=1, max_branches=self.width, returns=self.width)

    def begin(self, slot, view):
        self.slots.setdefault(view.request_id, []).append(slot)
        self.prompts[slot] = view.request_id

    def select(self, logits, batch):
        rows = batch.active.nonzero()[:, 0]
        top = logits[rows].log_softmax(1).topk(self.width)
        slot = batch.slot[rows].repeat_interleave(self.width)
        return Candidates(slot, top.indices.flatten(), top.values.flatten(), top.values.flatten())

    def survive(self, candidates, stops):
        slots = candidates.slot.tolist()
        branches, finished = [], []
        for own in self.slots.values():
            mine = [i for i, slot in enumerate(slots) if slot in own]
            if len(mine) == self.width:  # the prompt's
                chosen = mine
            else:
                chosen = [mine[(i + 1) % self.width * self.width] for i in range(self.width)]
            for slot, index in zip(own, chosen if mine else (), strict=False):
                if stops[index] is None:
                    branches.append((slot, index, 0.0))
                else:
                    finished.append((index, -float(own.index(slot))))
        return Survivors(branches, finished)

    def end(self, slot):
        self.slots.pop(self.prompts.pop(slot), None)


class Swap(Spread):
    width = 2


class Notes(HostLogitsProcessor):
    """Its state is all that it was told; it changes nothing, but would notice a text that is not its own."""

    def start(self, view):
        return list(view.prompt)

    def process(self, state, tokens, logits):
        assert state == list(tokens)

    def accept(self, state, tokens):
        return [*state, *tokens]


class Sums(DeviceLogitsProcessor):
    """Keeps the sum of the tokens, prompt included, and fails where it is not that of the text."""

    def setup(self, context):
        self.sums = torch.zeros(context.slots, dtype=torch.int64)

    def begin(self, slot, view):
        self.sums[slot] = sum(view.prompt)

    def apply(self, logits, batch):
        for slot in batch.slot[batch.active].tolist():
            text = batch.context.tokens[slot, : batch.context.lengths[slot]]
            assert int(text.sum()) == int(self.sums[slot])

    def commit(self, batch):
        tokens = batch.tokens * (torch.arange(batch.tokens.shape[1]) < batch.counts[:, None])
        self.sums[batch.slot] += tokens.sum(1) * batch.active

    def fork(self, src, dst):
        self.sums[dst] = self.sums[src]


class Strange(Spread):
    """Names a slot that is not its request's."""

    def survive(self, candidates, stops):
        return Survivors([(7, 0, 0.0)])


class Stubborn(Spread):
    def survive(self, candidates, stops):
        return Survivors([(slot, i, 0.0) for i, slot in enumerate(candidates.slot.unique().tolist())])


class Twice(Spread):
    def survive(self, candidates, stops):
        slot = int(candidates.slot[0])
        return Survivors([(slot, 0, 0.0), (slot, 1, 0.0)])


class Beyond(Spread):
    def survive(self, candidates, stops):
        return Survivors(finished=[(999, 0.0)])


class Nothing(Spread):
    def survive(self, candidates, stops):
        return Survivors()


class Raises(Spread):
    def survive(self, candidates, stops):
        raise ValueError("survive")


class NotSurvivors(Spread):
    def survive(self, candidates, stops):
        return []


class Doubles(Spread):
    def select(self, logits, batch):
        return Candidates(batch.slot, batch.slot, logits.double()[:, 0], logits[:, 0])


class Foreign(Spread):
    def select(self, logits, batch):
        return Candidates(batch.slot * 0 + 7, batch.slot, logits[:, 0], logits[:, 0])


class BestOf(Decoder):
    """Draws three texts and gives the two with the largest sum of tokens."""

    def plan(self, view):
        return BranchPlan(branches=3, max_branches=3, returns=2)

    def setup(self, context):
        self.ones = torch.ones(context.slots, dtype=torch.int64)

    def select(self, logits, batch):
        place = (batch.context.seeds[batch.slot] + batch.context.lengths[batch.slot]) % 5
        tokens = logits.topk(5).indices.gather(1, place[:, None])
        return Selection(tokens, self.ones[: len(tokens)])

    def finalize(self, request_id, hypotheses):
        return sorted(hypotheses, key=lambda one: -sum(one.tokens))


class BadFinalize(BestOf):
    def finalize(self, request_id, hypotheses):
        return [1]


class Greedy(Decoder):
    needs = frozenset()

    def plan(self, view):
        return BranchPlan(branches=2, max_branches=1)


class Extra:
    hook_api = "decoder>=1.1,<2"

    @hookimpl
    def trtllm_register_decoders(self, registrar):
        for cls in DECODERS:
            registrar.add(cls.__name__, cls, consumes=("random_seed",))


WRONG = {
    Strange: "in slot 7, which its request",
    Stubborn: "lets a candidate go on that stops",
    Twice: "several candidates in one slot",
    Beyond: r"candidates \[999\] survive",
    Nothing: "left a request without any sequence",
    Raises: "'Raises' raised ValueError: survive",
    NotSurvivors: "returned a list from survive",
    Doubles: "scores is no float32",
    Foreign: "candidates for slot 7, which is not its own",
}
DECODERS = (Spread, Swap, BestOf, BadFinalize, Greedy, *WRONG)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load(extra=[Extra()])


@pytest.fixture
def runner(plugins) -> ModelRunner:
    return make(plugins)


def make(plugins, policy="paged", beams=4, batch=2) -> ModelRunner:
    build = BuildConfig(
        max_batch_size=batch, max_beam_width=beams, max_input_len=64, max_seq_len=96, tokens_per_block=8
    )
    made = ModelRunner.from_engine(
        MarkovExecutable(build=build), plugins=plugins, kv_cache=KVCacheConfig(policy=policy)
    )
    made.generation.loop.branches.token_bytes = TokenBytes([b"%d " % i for i in range(97)])
    return made


def assert_nothing_is_lost(runner):
    loop = runner.generation.loop
    table = loop.branches
    assert (table.slots.free, table.live, table.owners, table.unborn) == (table.slots.context.slots, {}, {}, {})
    assert not any(stages.live or stages._of for stages in table.stages)
    usage = loop.cache.usage()
    assert usage.free == usage.total
    loop.cache.policy.check_integrity()
    if isinstance(loop.cache.policy, PrefixPolicy):  # what is kept for reuse is what it says
        entries = runner.session.engine._cache.view(loop.cache.plan.num_blocks, -1).numpy()
        assert all(node is None or entries[node.block].tobytes() == node.key for node in loop.cache.policy._tree._nodes)


def replay(deltas):
    """What a user has who follows a stream: tokens, text and reason of each sequence."""
    tokens, text, reasons, log_probs = {}, {}, {}, {}
    for delta in deltas:
        key = delta.request_id, delta.sequence
        assert key not in reasons, "nothing comes after the end"
        have, said, known = tokens.get(key, []), text.get(key, ""), log_probs.get(key, [])
        if delta.keep is not None:
            assert delta.keep <= len(have)
            have, said, known = have[: delta.keep], said[: delta.keep_text], known[: delta.keep]
        tokens[key], text[key] = [*have, *delta.tokens], said + delta.text
        log_probs[key] = [*known, *delta.log_probs]
        if delta.finish_reason:
            reasons[key] = delta.finish_reason
    return {key: (tuple(tokens[key]), text[key], reasons.get(key), tuple(log_probs[key])) for key in tokens}


# -- many answers to a prompt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["paged", "prefix", "contiguous"])
def test_answers_are_those_of_their_own_random_keys_and_share_the_prompt(plugins, policy):
    r = make(plugins, policy)
    out = r.generate([PROMPT], DRAWS.replace(num_return_sequences=4), text=True)
    alone = r.generate([PROMPT], DRAWS)["outputs"][0]
    assert out["output_ids"].shape == (1, 4, len(PROMPT) + 20)
    texts = [one.tokens for one in out["outputs"]]
    assert [one.sequence for one in out["outputs"]] == [0, 1, 2, 3]
    assert texts[0] == alone.tokens, "the first is the one that a request for one gets"
    assert len(set(texts)) == 4
    assert all(one.text == "".join(f"{token} " for token in one.tokens) for one in out["outputs"])
    assert [row[len(PROMPT) :].tolist() for row in out["output_ids"][0]] == [list(text) for text in texts]
    assert_nothing_is_lost(r)


def test_the_prompt_runs_once(runner):
    ran = []
    execute = runner.session.engine.execute

    def watch(inputs, outputs, stream):
        ran.append(len(inputs["input_ids"]))
        execute(inputs, outputs, stream)

    runner.session.engine.execute = watch
    runner.generate([PROMPT], DRAWS.replace(num_return_sequences=4, max_new_tokens=3))
    assert ran == [len(PROMPT), 4, 4]


def test_different_numbers_of_answers_in_one_batch(runner):
    configs = [DRAWS.replace(num_return_sequences=3), DRAWS.replace(output_sequence_lengths=True)]
    out = runner.generate([PROMPT, [1]], configs)
    assert [(one.request_id, one.sequence) for one in out["outputs"]] == [("0", 0), ("0", 1), ("0", 2), ("1", 0)]
    assert out["output_ids"].shape == (2, 3, len(PROMPT) + 20)
    assert out["sequence_lengths"].tolist() == [[29, 29, 29], [21, 0, 0]]
    assert (out["output_ids"][1, 1:] == 0).all()


def test_a_stream_names_the_answer(runner):
    config = DRAWS.replace(num_return_sequences=3, output_log_probs=True)
    got = replay(runner.generate([PROMPT, [1]], config, streaming=True, text=True))
    for one in runner.generate([PROMPT, [1]], config, text=True)["outputs"]:
        assert got[one.request_id, one.sequence] == (one.tokens, one.text, "length", one.log_probs)


def test_answers_end_by_themselves_and_free_their_place(runner):
    config = DRAWS.replace(num_return_sequences=4, end_id=tuple(range(12)), min_length=0)
    left = []
    for deltas in runner.generation._batch.run(make_requests(runner, runner.generation.lora, [PROMPT], config), {}):
        ended = sum(delta.finish_reason is not None for delta in deltas)
        left.append((runner.generation.loop.branches.slots.free, ended))
    free = 4
    for have, ended in left:
        free += ended
        assert have == free
    assert free == 8
    assert len({have for have, _ in left}) > 2, "or they all ended at once, which shows nothing"


def test_requests_wait_for_enough_slots(runner):
    config = DRAWS.replace(num_return_sequences=3)
    together = runner.generate([PROMPT, [1]], config)["outputs"]
    three = make(runner.generation.plugins, beams=3, batch=1)
    stream = three.generation._batch.run(
        make_requests(three, three.generation.lora, [PROMPT, [1]], config), started := {}
    )
    for _ in stream:
        pass
    got = [one.tokens for i in "01" for one in started[i].sequences]
    assert got == [one.tokens for one in together]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_return_sequences": 9}, r"9 branches, but the engine has 8 slots"),
        ({"decoder": "Spread"}, r"'Spread' searches with 3 branches, .* max_beam_width 2"),
    ],
)
def test_more_branches_than_the_engine_has_are_refused_before_the_first_token(plugins, fields, words):
    r = make(plugins, beams=2, batch=4)
    greedy = SamplingConfig(end_id=(), max_new_tokens=20, return_dict=True)
    with pytest.raises(CapacityError, match=words):
        r.generate([[1], PROMPT], [greedy, greedy.replace(**fields)])
    assert r.session.engine.calls == 0


def test_branches_that_the_pool_cannot_hold_are_refused_before_the_first_token(plugins):
    build = BuildConfig(max_batch_size=4, max_input_len=64, max_seq_len=96, tokens_per_block=8)
    r = ModelRunner.from_engine(MarkovExecutable(build=build), plugins=plugins, kv_cache=KVCacheConfig(max_tokens=96))
    with pytest.raises(CapacityError, match="4 branches of 9 prompt tokens .* need 16 blocks of cache"):
        r.generate([PROMPT], DRAWS.replace(num_return_sequences=4))
    assert r.session.engine.calls == 0
    assert len(r.generate([PROMPT], DRAWS.replace(num_return_sequences=3))["outputs"]) == 3


def test_a_plan_that_makes_no_sense_is_refused(runner):
    with pytest.raises(PluginContractError, match="'Greedy' returned BranchPlan"):
        runner.generate([PROMPT], decoder="Greedy", end_id=())


def test_a_failure_in_one_branch_ends_them_all(runner):
    class FailsInThird(HostStoppingCriterion):
        def start(self, view):
            return view.branch

        def check(self, state, tokens, new):
            return 5 if state == 2 and len(tokens) == len(PROMPT) + 3 else None

    config = DRAWS.replace(num_return_sequences=3)
    expected = runner.generate([PROMPT], config)["outputs"]
    deltas = list(runner.generate([PROMPT], config, streaming=True, stopping_criteria=FailsInThird()))
    got = replay(deltas)
    assert {key: reason for key, (_, _, reason, _) in got.items()} == {("0", i): "plugin_error" for i in range(3)}
    assert all(got["0", i][0] == expected[i].tokens[:3] for i in range(3))
    assert sum(delta.error is not None for delta in deltas) == 3
    assert_nothing_is_lost(runner)


# -- scope of stopping ------------------------------------------------------------------------------------------------


class AllAtToken(HostStoppingCriterion):
    """Ends all branches when one of them has six tokens and is the second."""

    scope = "request"

    def start(self, view):
        return view.branch, len(view.prompt)

    def check(self, state, tokens, new):
        branch, prompt = state
        return Stop("enough") if branch == 1 and len(tokens) + len(new) - prompt == 6 else None


class AllOnDevice(DeviceStoppingCriterion):
    scope = "request"
    reason = "enough"

    def begin(self, slot, view):
        self.at = len(view.prompt) + 5
        self.slot = slot if view.branch == 1 else getattr(self, "slot", -1)

    def check(self, batch):
        hit = (batch.slot == self.slot) & (batch.context.lengths[batch.slot] == self.at)
        return torch.where(hit, 0, -1)


@pytest.mark.parametrize("criterion", [AllAtToken, AllOnDevice])
def test_a_criterion_of_scope_request_ends_all_branches(runner, criterion):
    config = DRAWS.replace(num_return_sequences=3)
    free = runner.generate([PROMPT], config)["outputs"]
    out = runner.generate([PROMPT], config, stopping_criteria=criterion())["outputs"]
    assert [one.finish_reason for one in out] == ["enough"] * 3
    assert [one.tokens for one in out] == [one.tokens[:6] for one in free], "they keep the tokens of the step"
    assert_nothing_is_lost(runner)


def test_a_branch_that_ends_by_itself_keeps_its_reason(runner):
    config = DRAWS.replace(num_return_sequences=3)
    free = runner.generate([PROMPT], config)["outputs"]
    words = [free[0].tokens[4:6]]
    out = runner.generate([PROMPT], config.replace(stop_words_list=words), stopping_criteria=AllAtToken())["outputs"]
    assert [one.finish_reason for one in out] == ["stop_words", "enough", "enough"]


# -- searches ---------------------------------------------------------------------------------------------------------


def cycle(table: torch.Tensor, prompt: list[int], width: int, steps: int) -> list[list[int]]:
    """What ``Spread`` must give: every step each branch takes over the next one's text and goes on greedily."""
    texts = [[token] for token in table[prompt[-1]].topk(width).indices.tolist()]
    for _ in range(steps - 1):
        texts = [list(texts[(i + 1) % width]) for i in range(width)]
        for text in texts:
            text.append(int(table[text[-1]].argmax()))
    return texts


@pytest.mark.parametrize("policy", ["paged", "prefix", "contiguous"])
@pytest.mark.parametrize(("decoder", "width"), [("Swap", 2), ("Spread", 3)])
def test_forks_in_cycles_go_through_the_whole_loop(plugins, policy, decoder, width):
    """0←1, 1←0 and 0←1, 1←2, 2←0 every step: text, cache and the state of processors stay those of their branch."""
    r = make(plugins, policy)
    config = SamplingConfig(decoder=decoder, end_id=(), max_new_tokens=17, return_dict=True)
    out = r.generate([PROMPT], config, text=True, logits_processor=[Notes(), Sums()])["outputs"]
    assert [list(one.tokens) for one in out] == cycle(r.session.engine.table, PROMPT, width, 17)
    assert all(one.text == "".join(f"{token} " for token in one.tokens) for one in out)
    assert [one.finish_reason for one in out] == ["length"] * width
    assert_nothing_is_lost(r)
    again = r.generate([[*PROMPT, *out[0].tokens]], max_new_tokens=3, end_id=(), return_dict=True)["outputs"][0]
    assert again.cached_prompt_tokens == (24 if policy == "prefix" else 0)


def test_a_search_beside_samplers(runner):
    search = SamplingConfig(decoder="Spread", end_id=(), max_new_tokens=9, output_log_probs=True, return_dict=True)
    draws = DRAWS.replace(num_return_sequences=2, output_log_probs=True)
    alone = runner.generate([[3]], draws)["outputs"] + runner.generate([PROMPT], search)["outputs"]
    both = runner.generate([[3], PROMPT], [draws, search])["outputs"]
    assert [one.tokens for one in both] == [one.tokens for one in alone]
    for one, other in zip(both, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs))
    table = runner.session.engine.table.log_softmax(1)
    found = both[-1]
    steps = [PROMPT[-1], *found.tokens]
    torch.testing.assert_close(torch.tensor(found.log_probs), table[steps[:-1], steps[1:]])


def test_a_search_streams_revisions(runner):
    config = SamplingConfig(decoder="Spread", end_id=(), max_new_tokens=9, output_log_probs=True, return_dict=True)
    deltas = list(runner.generate([PROMPT], config, streaming=True, text=True))
    assert any(delta.keep is not None for delta in deltas)
    got = replay(deltas)
    for one in runner.generate([PROMPT], config, text=True)["outputs"]:
        assert got["0", one.sequence] == (one.tokens, one.text, "length", one.log_probs)
    plain = config.replace(output_log_probs=False, return_dict=False)
    histories = list(runner.generate([PROMPT], plain, streaming=True, full=True))
    assert torch.equal(histories[-1], runner.generate([PROMPT], plain))


def test_a_branch_that_stops_becomes_a_hypothesis(runner):
    """Branch 1 ends at once; the others go on, and the user gets all three."""
    first = runner.session.engine.table[PROMPT[-1]].topk(3).indices.tolist()
    config = SamplingConfig(decoder="Spread", end_id=first[1], min_length=0, max_new_tokens=1, return_dict=True)
    out = runner.generate([PROMPT], config)["outputs"]
    assert [(list(one.tokens), one.finish_reason) for one in out] == [
        ([first[0]], "length"),
        ([first[1]], "end_id"),
        ([first[2]], "length"),
    ]
    assert [one.length - len(PROMPT) for one in out] == [1, 0, 1]


def test_a_search_under_a_criterion_of_scope_request(runner):
    class Soon(HostStoppingCriterion):
        scope = "request"

        def check(self, state, tokens, new):
            return Stop("soon") if len(tokens) == len(PROMPT) + 4 else None

    config = SamplingConfig(decoder="Spread", end_id=(), max_new_tokens=17, return_dict=True)
    out = runner.generate([PROMPT], config, stopping_criteria=Soon())["outputs"]
    assert [list(one.tokens) for one in out] == cycle(runner.session.engine.table, PROMPT, 3, 5)
    assert {one.finish_reason for one in out} == {"soon"}


def test_ranking_is_the_decoders(runner):
    config = SamplingConfig(decoder="BestOf", end_id=(), max_new_tokens=9, random_seed=3, return_dict=True)
    out = runner.generate([PROMPT], config, text=True)["outputs"]
    assert len(out) == 2
    assert sum(out[0].tokens) >= sum(out[1].tokens)
    got = replay(runner.generate([PROMPT], config, streaming=True, text=True))
    assert {key: value[:3] for key, value in got.items()} == {
        ("0", one.sequence): (one.tokens, one.text, "length") for one in out
    }
    assert_nothing_is_lost(runner)


@pytest.mark.parametrize("decoder", WRONG)
def test_a_search_that_breaks_the_contract_fails_alone(plugins, decoder):
    r = make(plugins)
    expected = r.generate([[3]], DRAWS)["outputs"][0].tokens
    bad = SamplingConfig(decoder=decoder.__name__, end_id=(), max_new_tokens=1, return_dict=True)
    good, *failed = r.generate([[3], PROMPT], [DRAWS, bad])["outputs"]
    assert good.tokens == expected
    assert {one.finish_reason for one in failed} == {"plugin_error"}
    with pytest.raises(Exception, match=WRONG[decoder]):
        raise failed[0].error
    assert_nothing_is_lost(r)


def test_a_ranking_that_is_none_is_an_error(runner):
    config = SamplingConfig(decoder="BadFinalize", end_id=(), max_new_tokens=3, return_dict=True)
    out = runner.generate([PROMPT], config)["outputs"]
    assert [one.finish_reason for one in out] == ["plugin_error"] * 2
    assert all(len(one.tokens) == 3 for one in out)
    assert "'BadFinalize' returned [1] from finalize" in str(out[0].error)


def test_a_search_that_is_left_gives_everything_back(runner):
    config = SamplingConfig(decoder="Spread", end_id=(), max_new_tokens=17)
    stream = runner.generate([PROMPT], config, streaming=True)
    for _ in range(7):
        next(stream)
    stream.close()
    assert_nothing_is_lost(runner)


def test_hypotheses_are_ranked_by_score_by_default():
    one, other, last = Hypothesis([1], 1.0), Hypothesis([2], 2.0), Hypothesis([3], 1.0)
    assert Decoder().finalize("r", [one, other, last]) == [other, one, last]
