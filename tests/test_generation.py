"""The loop and the static batch, on a model without weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trtllm_core import GenerationSession, KVCacheConfig, ModelRunner, Plugins, SamplingConfig, Session, use
from trtllm_core.config import BuildConfig
from trtllm_core.decoding.planned import LastPlan
from trtllm_core.errors import CapacityError, ConfigError, PluginContractError
from trtllm_core.plugin import HostStoppingCriterion
from trtllm_core.plugin.kv_policy import Edits, Move
from trtllm_core.testing.markov import MarkovExecutable

PROMPTS = [[5, 6, 7], [11], [3] * 20, [9, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42, 17]]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


def runner(plugins, **options) -> ModelRunner:
    kv = options.pop("kv_cache", None)
    return ModelRunner.from_engine(MarkovExecutable(**options), plugins=plugins, kv_cache=kv)


def greedy(model: MarkovExecutable, prompt: list[int], count: int) -> list[int]:
    """The reference: follow the table."""
    out, last = [], prompt[-1]
    for _ in range(count):
        last = int(model.table[last].argmax())
        out.append(last)
    return out


def outputs(r: ModelRunner, prompts, **fields):
    return r.generate(prompts, return_dict=True, end_id=(), **fields)["outputs"]


def test_greedy_follows_the_table(plugins):
    r = runner(plugins)
    for prompt, out in zip(PROMPTS, outputs(r, PROMPTS, max_new_tokens=30), strict=True):
        assert list(out.tokens) == greedy(r.session.engine, prompt, 30)
        assert (out.finish_reason, out.length) == ("length", len(prompt) + 30)
    assert r.generation.loop.cache.usage().free == r.generation.loop.cache.usage().total


def test_result_is_the_classic_tensor_and_dictionary(plugins):
    r = runner(plugins)
    end = greedy(r.session.engine, [11], 3)[2]
    ids = r.generate([torch.tensor([5, 6, 7]), torch.tensor([11])], end_id=end, max_new_tokens=6)
    assert ids.dtype == torch.int32
    assert ids.shape == (2, 1, 9)
    assert ids[1, 0, 0] == 11
    assert (ids[1, 0, 3:] == end).all(), "behind the end stands the end token"
    out = r.generate(
        [[5, 6, 7], [11]],
        end_id=end,
        max_new_tokens=6,
        return_dict=True,
        output_sequence_lengths=True,
        output_log_probs=True,
        output_cum_log_probs=True,
    )
    assert torch.equal(out["output_ids"], ids)
    assert out["sequence_lengths"][1].tolist() == [1 + 2], "the end token is written and not counted"
    assert out["finish_reasons"][1] == "end_id"
    log_probs = r.session.engine.table.log_softmax(-1)
    first, second = greedy(r.session.engine, [11], 2)
    torch.testing.assert_close(out["log_probs"][1, 0, 2], log_probs[first, second])
    torch.testing.assert_close(out["cum_log_probs"][1, 0], out["log_probs"][1, 0].sum())


def test_padding_follows_pad_id(plugins):
    r = runner(plugins)
    end = greedy(r.session.engine, [11], 1)[0]
    ids = r.generate([[11]], end_id=end, pad_id=96, max_new_tokens=4, min_length=0)
    assert ids[0, 0].tolist() == [11, end, 96, 96, 96]


def test_streaming_yields_deltas_and_full_yields_the_history(plugins):
    r = runner(plugins)
    deltas = list(r.generate(PROMPTS[:2], max_new_tokens=5, end_id=(), streaming=True))
    assert [d.tokens for d in deltas if d.request_id == "1"] == [(t,) for t in greedy(r.session.engine, [11], 5)]
    assert [d.finish_reason for d in deltas] == [None] * 8 + ["length"] * 2
    histories = list(r.generate(PROMPTS[:2], max_new_tokens=5, end_id=(), streaming=True, full=True))
    assert len(histories) == 5
    assert torch.equal(histories[-1], r.generate(PROMPTS[:2], max_new_tokens=5, end_id=()))


def test_a_full_stream_has_lengths_and_log_probs_as_they_grow(plugins):
    r = runner(plugins)
    config = SamplingConfig(
        max_new_tokens=5,
        end_id=(),
        return_dict=True,
        output_sequence_lengths=True,
        output_log_probs=True,
        output_cum_log_probs=True,
    )
    configs = [config, config.replace(end_id=greedy(r.session.engine, [11], 3)[-1])]
    histories = list(r.generate(PROMPTS[:2], configs, streaming=True, full=True))
    start = [len(prompt) for prompt in PROMPTS[:2]]
    grown = [[start[0] + n, start[1] + min(n, 2)] for n in range(1, 6)]  # the end token does not count
    assert [history["sequence_lengths"][:, 0].tolist() for history in histories] == grown
    last = r.generate(PROMPTS[:2], configs)
    assert histories[-1].keys() == last.keys() - {"outputs", "finish_reasons"}
    for name, tensor in histories[-1].items():
        assert torch.equal(tensor, last[name]), name
    assert (histories[0]["log_probs"] != 0).sum() == 2
    assert (last["log_probs"] != 0).sum() == 5 + 3


def test_a_stream_that_is_left_gives_everything_back(plugins):
    r = runner(plugins)
    stream = r.generate(PROMPTS, max_new_tokens=50, end_id=(), streaming=True)
    next(stream)
    stream.close()
    assert r.generation.loop.branches.slots.free == 8
    usage = r.generation.loop.cache.usage()
    assert usage.free == usage.total
    r.generation.loop.cache.policy.check_integrity()


def test_prompts_are_cut_to_the_steps_budget(plugins):
    build = BuildConfig(max_batch_size=4, max_input_len=100, max_seq_len=128, max_num_tokens=7, tokens_per_block=8)
    r = runner(plugins, build=build)
    out = outputs(r, PROMPTS[:4], max_new_tokens=10)
    for prompt, one in zip(PROMPTS, out, strict=False):
        assert list(one.tokens) == greedy(r.session.engine, prompt, 10)


def test_a_small_pool_makes_requests_wait(plugins):
    r = runner(plugins, kv_cache=KVCacheConfig(max_tokens=64))
    out = outputs(r, PROMPTS, max_new_tokens=20)
    for prompt, one in zip(PROMPTS, out, strict=True):
        assert list(one.tokens) == greedy(r.session.engine, prompt, 20)


def test_a_pool_that_can_never_hold_a_request_says_so(plugins):
    r = runner(plugins, kv_cache=KVCacheConfig(max_tokens=32))
    with pytest.raises(CapacityError, match=r"max_tokens|pool"):
        r.generate([[1] * 30], max_new_tokens=20, end_id=())
    assert len(outputs(r, [[1, 2]], max_new_tokens=3)[0].tokens) == 3, "and the session lives on"


@pytest.mark.parametrize("policy", ["paged", "contiguous"])
def test_policies_give_the_same_tokens(plugins, policy):
    r = runner(plugins, kv_cache=KVCacheConfig(policy=policy))
    for prompt, one in zip(PROMPTS, outputs(r, PROMPTS, max_new_tokens=20), strict=True):
        assert list(one.tokens) == greedy(r.session.engine, prompt, 20)


@pytest.mark.parametrize(
    ("prompts", "fields", "error", "words"),
    [
        ([], {}, ConfigError, "no prompt"),
        ([[]], {}, ConfigError, "empty"),
        ([[1, 97]], {}, ConfigError, "token id 97"),
        ([[-1]], {}, ConfigError, "token id -1"),
        ([[1] * 128], {}, CapacityError, "at most 127"),
        ([[1] * 100], {"max_new_tokens": 100}, CapacityError, "128 together"),
        ([[1]] * 9, {}, CapacityError, "max_batch_size 8"),
        ([[1]], {"temprature": 2}, ConfigError, "no field 'temprature'"),
        ([[1]], {"top_p": 2.0}, ConfigError, "top_p"),
        ([[1]], {"output_log_probs": True}, ConfigError, "'output_log_probs': .* return_dict"),
        ([[1]], {"output_sequence_lengths": True}, ConfigError, "'output_sequence_lengths': .* return_dict"),
        ([[1]], {"text": True}, ConfigError, "'text': .* return_dict"),
        ([[1]], {"num_beams": 4}, CapacityError, "max_beam_width 1"),
        ([[1]], {"top_p_decay": 0.5}, ConfigError, "top_p_decay=0.5"),
        ([[1]], {"stop_strings": "x"}, ConfigError, "text"),
        ([[1]], {"logits_processors": "penaltis"}, LookupError, "did you mean 'penalties'"),
        ([[1]], {"decoder": "bean_search"}, LookupError, "did you mean 'beam_search'"),
        ([[1]], {"logits_processors": [{"name": "penalties", "params": {"a": 1}}]}, ConfigError, "no parameters"),
    ],
)
def test_wrong_requests_get_a_sentence_and_lose_nothing(plugins, prompts, fields, error, words):
    r = runner(plugins)
    with pytest.raises(error, match=words):
        r.generate(prompts, **fields)
    assert r.generation.loop.branches.slots.free == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 0, "top_p": 1.0},
        {"top_k": 0, "top_p": 0.5, "preset": "hf", "typical_p": 0.5, "eta_cutoff": 0.1},
        {"decoder": "mirostat"},
    ],
)
def test_where_every_token_is_forbidden_the_request_fails_alone(plugins, fields):
    """And never with a token that was forbidden."""
    r = runner(plugins)
    config = SamplingConfig(end_id=(), max_new_tokens=4, return_dict=True, random_seed=1, **fields)
    nothing = config.replace(embedding_bias=[-float("inf")] * 97)
    failed, fine = r.generate([[5], [5]], [nothing, config])["outputs"]
    assert (failed.finish_reason, failed.tokens) == ("plugin_error", ())
    assert str(failed.error).endswith("found every token forbidden")
    assert (fine.finish_reason, len(fine.tokens)) == ("length", 4)


def test_fields_as_vectors_are_each_sequences_own(plugins):
    """The classic runtime pointed at the wrong words for every row after the first."""
    r = runner(plugins)
    free = [greedy(r.session.engine, [token], 6) for token in (11, 12, 13)]
    words = [[[free[0][2]]], [[free[1][1]]], []]
    out = r.generate([[11], [12], [13]], max_new_tokens=[6, 6, 4], stop_words_list=words, end_id=(), return_dict=True)[
        "outputs"
    ]
    assert [list(one.tokens) for one in out] == [free[0][:3], free[1][:2], free[2][:4]]
    bans = r.generate([[11], [12], [13]], max_new_tokens=1, end_id=(), bad_words_list=[[], [], [[free[2][0]]]])
    firsts = bans[:, 0, 1].tolist()
    assert firsts[:2] == [free[0][0], free[1][0]]
    assert firsts[2] == r.session.engine.table[13].argsort(descending=True)[1]
    with pytest.raises(ConfigError, match="temperature has 2 values for a batch of 3"):
        r.generate([[11], [12], [13]], temperature=[0.1, 0.2])


def test_generation_session_checks_its_setup(plugins):
    session = GenerationSession(None, Session(MarkovExecutable()), plugins=plugins)
    ids, lengths = torch.tensor([[5, 6, 0], [11, 12, 13]]), torch.tensor([2, 3])
    config = SamplingConfig(end_id=(), max_new_tokens=4)
    with pytest.raises(ConfigError, match="setup"):
        session.decode(ids, lengths, config)
    session.setup(2, 3, 4)
    padded = session.decode(ids, lengths, config)
    packed = session.decode(torch.tensor([5, 6, 11, 12, 13]), lengths, config)
    assert torch.equal(padded, packed)
    assert padded[0, 0, 2:6].tolist() == greedy(session.session.engine, [6], 4)
    with pytest.raises(ConfigError, match="setup was for 2"):
        session.decode(ids[:1], lengths[:1], config)
    with pytest.raises(CapacityError, match="batch_size is 99"):
        session.setup(99, 3, 4)
    beams = MarkovExecutable(build=BuildConfig(max_seq_len=64, max_input_len=32, max_beam_width=4))
    wide = GenerationSession(None, Session(beams), plugins=plugins)
    with pytest.raises(CapacityError, match=r"beam_width is 5; .* 1 to 4"):
        wide.setup(1, 3, 4, beam_width=5)
    wide.setup(1, 3, 4, beam_width=2)
    with pytest.raises(ConfigError, match="beam_width 2; decode got num_beams 3"):
        wide.decode(ids[:1], lengths[:1], config.replace(num_beams=3))


def test_stop_and_bad_words_of_decode(plugins):
    session = GenerationSession(None, Session(MarkovExecutable()), plugins=plugins)
    session.setup(1, 1, 8)
    ids, lengths = torch.tensor([[11]]), torch.tensor([1])
    config = SamplingConfig(end_id=(), max_new_tokens=8, return_dict=True)
    path = greedy(session.session.engine, [11], 8)
    out = session.decode(ids, lengths, config, stop_words_list=[path[1:3]])["outputs"][0]
    assert (list(out.tokens), out.finish_reason) == (path[:3], "stop_words")
    out = session.decode(ids, lengths, config, bad_words_list=[[path[0]]])["outputs"][0]
    assert out.tokens[0] == session.session.engine.table[11].argsort(descending=True)[1]


def test_a_request_gives_the_same_tokens_in_any_company(plugins):
    r = runner(plugins)
    config = SamplingConfig(
        top_k=0, top_p=0.9, temperature=1.3, random_seed=7, end_id=(), max_new_tokens=25, return_dict=True
    )
    alone = r.generate([[42, 17]], config)["outputs"][0]
    others = [config.replace(random_seed=i, repetition_penalty=1.2, max_new_tokens=9 + i) for i in range(5)]
    crowd = r.generate([*PROMPTS[:5], [42, 17]], [*others, config])["outputs"]
    assert crowd[5].tokens == alone.tokens
    assert crowd[5].seed == 7
    drawn = r.generate([[42, 17]], config.replace(random_seed=None))["outputs"][0]
    again = r.generate([[42, 17]], config.replace(random_seed=drawn.seed))["outputs"][0]
    assert again.tokens == drawn.tokens


def test_explain_names_consumers_and_what_was_left_out(plugins):
    plan = runner(plugins).explain(SamplingConfig(temperature=0.7, repetition_penalty=1.1, bad_words_list=[[1]]))
    assert plan.decoder.name == "greedy"
    assert [item.name for item in plan.processors] == ["penalties", "min_length", "bad_words"]
    assert plan.consumers["repetition_penalty"] == ("penalties",)
    assert any("temperature" in note for note in plan.notes)
    assert (
        plan.digest()
        == runner(plugins)
        .explain(SamplingConfig(temperature=0.7, repetition_penalty=1.1, bad_words_list=[[1]]))
        .digest()
    )


@pytest.mark.parametrize("policy", ["paged", "contiguous"])
def test_a_later_request_too_large_for_the_pool_is_refused_before_anybody_starts(plugins, policy):
    build = BuildConfig(max_batch_size=2, max_input_len=100, max_seq_len=128, tokens_per_block=8)
    r = runner(plugins, build=build, kv_cache=KVCacheConfig(policy=policy, max_tokens=64))
    with pytest.raises(
        CapacityError, match="100 prompt tokens and max_new_tokens 20 need 120 .*KVCacheConfig.max_tokens"
    ):
        r.generate([[1], [1] * 100], max_new_tokens=20, end_id=())
    assert r.session.engine.calls == 0


def test_a_policy_that_moves_what_nobody_computed_is_refused(plugins, monkeypatch):
    r = runner(plugins)
    policy = r.generation.loop.cache.policy
    extend, edits = policy.extend, Edits(moves=(Move(0, 0, 1),))
    monkeypatch.setattr(policy, "extend", lambda slots, counts: replace(extend(slots, counts), edits=edits))
    with pytest.raises(PluginContractError, match="PagedPolicy moves or drops entries where nothing was computed"):
        r.generate([[1]], end_id=())
    assert r.session.engine.calls == 0
    assert r.generation.loop.branches.slots.free == 8


class NeverStops(HostStoppingCriterion):
    def check(self, state, tokens, new):
        return None


def test_requests_with_the_same_wishes_are_planned_once(plugins):
    planner = runner(plugins).generation.loop.branches.planner
    wish, other = SamplingConfig(top_k=0, top_p=0.9), SamplingConfig(top_k=0, top_p=0.9, repetition_penalty=1.1)
    plan = planner.plan(wish, prompt=(1, 2))
    assert planner.plan(wish, prompt=(3,)) is plan
    penalised = planner.plan(other, beside=plan.processors)
    assert planner.plan(wish, beside=penalised.processors) is not plan, "it must be put in order with theirs"
    assert planner.plan(wish, criteria=[NeverStops()]) is not plan
    first = planner.plan(wish.replace(max_new_tokens=7, random_seed=3))
    longer = planner.plan(wish.replace(max_new_tokens=9, random_seed=4))
    assert longer.processors is first.processors, "lengths and seeds make no difference"
    assert (first.asked["max_new_tokens"], longer.asked["max_new_tokens"], longer.asked["random_seed"]) == (7, 9, 4)
    assert planner.plan(wish.replace(max_new_tokens=9)).asked.keys() == {"top_k", "top_p", "max_new_tokens"}
    assert planner.plan(wish.replace(max_new_tokens=9, top_p=0.8)).asked["top_p"] == 0.8
    tensors = [wish.replace(stopping_criteria=use("max_tokens", t=torch.zeros(3))) for _ in range(2)]
    last = LastPlan()
    last.keep(tensors[0], plan)
    assert last.of(tensors[1]) is None, "they do not say whether they are equal"
