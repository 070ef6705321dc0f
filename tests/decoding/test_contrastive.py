"""Contrastive search against the formula, written out: (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from trtllm_core import BuildConfig, KVCacheConfig, ModelRunner, Plugins, SamplingConfig, build_engine, use
from trtllm_core.decoding.contrastive import ContrastiveSearch
from trtllm_core.decoding.request import Request
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin import hookimpl
from trtllm_core.session import Session
from trtllm_core.testing.checkpoints import write_llama
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.packed import PackedRows

LIMITS = BuildConfig(max_batch_size=5, max_beam_width=7, max_input_len=60, max_seq_len=96, tokens_per_block=4)
PROMPTS = [[5, 6, 7, 5, 6], [11], [42, 17, 3]]
ASKED = [{"top_k": 4}, {"top_k": 6, "penalty_alpha": 0.8}, {"top_k": 2, "penalty_alpha": 0.3}]


def config(new=20, end_id=(), **params):
    decoder = use("contrastive_search", **params)
    return SamplingConfig(decoder=decoder, end_id=end_id, max_new_tokens=new, return_dict=True)


def searched(model, prompt, new, top_k=4, penalty_alpha=0.6, banned=()):
    """``model`` gives logits ``[n, vocab]`` and hidden states ``[n, hidden]`` of the tokens of a text."""
    text = list(prompt)
    for _ in range(new):
        logits, states = model(text)
        last = logits[-1].double().clone()
        last[list(banned)] = -torch.inf
        chances = last.softmax(0)
        best = (-np.inf, None)
        for token in chances.argsort(descending=True, stable=True)[:top_k].tolist():
            if token in banned:
                continue
            mine = model([*text, token])[1][-1].double()
            alike = max(float(torch.cosine_similarity(mine, other.double(), dim=0)) for other in states)
            score = (1 - penalty_alpha) * float(chances[token]) - penalty_alpha * alike
            best = max(best, (score, token), key=lambda pair: pair[0])
        text.append(best[1])
    return text[len(prompt) :]


def of_markov(engine):
    def model(text):
        rows = engine.state_of(torch.tensor(text)) if engine.remembers else torch.tensor(text)
        return engine.table[rows], engine.states[rows]

    return model


@pytest.mark.parametrize("remembers", [False, True])
def test_against_the_formula(remembers):
    engine = MarkovExecutable(build=LIMITS, remembers=remembers)
    runner = ModelRunner.from_engine(engine, debug_mode=True)
    greedy = SamplingConfig(end_id=(), max_new_tokens=20, return_dict=True)
    outputs = runner.generate([*PROMPTS, [9]], [*(config(**params) for params in ASKED), greedy])["outputs"]
    due = [searched(of_markov(engine), p, 20, **params) for p, params in zip(PROMPTS, ASKED, strict=True)]
    assert [list(one.tokens) for one in outputs[:3]] == due
    (alone,) = runner.generate([[9]], greedy)["outputs"]
    assert outputs[3].tokens == alone.tokens
    plain = runner.generate(PROMPTS, greedy)["outputs"]
    assert any(one.tokens != other.tokens for one, other in zip(plain, outputs, strict=False)), "or it shows nothing"
    loop = runner.generation.loop
    assert loop.branches.slots.free == loop.branches.slots.context.slots
    loop.cache.policy.check_integrity()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive")
    build_engine(write_llama(folder / "hf"), folder / "engine", LIMITS.model_copy(update={"max_num_tokens": 40}))
    return folder / "engine"


def states_of(session, text):
    """Logits and hidden states of a text that runs on a cache of its own."""
    rows = PackedRows(session, 1)
    inputs = rows.inputs({0: text}) | {"hidden_indices": torch.arange(len(text))}
    logits = torch.empty(len(text), session.config.vocab_size_padded)
    states = torch.empty(len(text), session.config.model.hidden_size)
    session.run(inputs, {"logits": logits, "hidden_states": states})
    return logits[:, : session.config.model.vocab_size], states


@pytest.mark.parametrize("policy", ["paged", "prefix", "contiguous"])
def test_on_a_model(llama, policy):
    runner = ModelRunner.from_dir(llama, kv_cache=KVCacheConfig(policy=policy))
    other = Session.from_directory(llama)
    prompts = [list(range(1, 51)), [3, 1, 4, 1, 5]]  # the first does not fit in one call of the engine
    for _ in range(2):  # a second time, a policy may have the prompts in its cache
        outputs = runner.generate(prompts, [config(10, **params) for params in ASKED[:2]])["outputs"]
        for output, prompt, params in zip(outputs, prompts, ASKED, strict=False):
            assert list(output.tokens) == searched(lambda text: states_of(other, text), prompt, 10, **params)


def test_hidden_states_are_what_logits_are_made_of(llama):
    session = Session.from_directory(llama)
    logits, states = states_of(session, [5, 6, 7, 8])
    again = session.engine.module.logits(states)[:, : logits.shape[1]]
    torch.testing.assert_close(again, logits)


def test_streams_ends_and_words():
    engine = MarkovExecutable(build=LIMITS)
    runner = ModelRunner.from_engine(engine, debug_mode=True)
    free = searched(of_markov(engine), [5], 20)
    banned = (free[2], free[5])
    due = searched(of_markov(engine), [5], 20, banned=banned)
    asked = config().replace(bad_words_list=[[token] for token in banned], output_log_probs=True)
    (output,) = runner.generate([[5]], asked)["outputs"]
    assert list(output.tokens) == due
    assert len(output.log_probs) == 20
    (output,) = runner.generate([[5]], config(end_id=due[7]).replace(bad_words_list=asked.bad_words_list))["outputs"]
    assert list(output.tokens) == due[: due.index(due[7]) + 1]
    assert output.finish_reason == "end_id"
    deltas = list(runner.generate([[5]], config(), streaming=True))
    assert [token for delta in deltas for token in delta.tokens] == free
    assert all(delta.keep is None for delta in deltas), "it never changes its mind"


def test_a_cache_that_is_given_up(llama):
    """Between any two steps: the text is computed anew, and its states are still there."""
    runner = ModelRunner.from_dir(llama, batch_invariant=True)
    prompt, asked = [3, 1, 4, 1, 5], config(16)
    (due,) = runner.generate([prompt], asked)["outputs"]
    loop = runner.generation.loop
    live = loop.admit(Request("0", prompt, asked))
    for step in range(20):
        slot = live.slots[0]
        loop.step([slot], [int(loop.branches.slots.lengths[slot] - loop.cache.cached[slot])])
        if live.over:
            break
        if step % 3 == 1:
            loop.preempt(live)
            assert loop.resume(live)
    assert live.preemptions == 5
    assert live.sequences[0].tokens == tuple(due.tokens)


def test_every_candidate_is_forbidden():
    runner = ModelRunner.from_engine(MarkovExecutable(vocab_size=20, build=LIMITS))
    (output,) = runner.generate([[5]], config().replace(bad_words_list=[[token] for token in range(20)]))["outputs"]
    assert output.finish_reason == "plugin_error"
    assert "every token forbidden" in str(output.error)


def test_refusals():
    engine = MarkovExecutable(build=LIMITS)
    runner = ModelRunner.from_engine(engine)
    with pytest.raises(CapacityError, match="searches with 9 branches, but the engine was built for max_beam_width 7"):
        runner.generate([[5]], config(top_k=8))
    for wrong in ({"top_k": 1}, {"penalty_alpha": 1.5}, {"alpha": 0.5}):
        with pytest.raises(ConfigError, match="contrastive_search"):
            runner.generate([[5]], config(**wrong))
    with pytest.raises(ConfigError, match="num_return_sequences"):
        runner.generate([[5]], config().replace(num_return_sequences=2))
    engine.capabilities = dataclasses.replace(engine.capabilities, hidden_states=False)
    calls = engine.calls
    with pytest.raises(ConfigError, match="needs 'hidden_states', which this session cannot give it"):
        ModelRunner.from_engine(engine).generate([[5]], config())
    assert engine.calls == calls, "before the first token"


@pytest.mark.parametrize("policy", ["paged", "prefix"])
def test_a_pool_that_is_promised_to_nobody(llama, policy):
    """Where candidates find no room, somebody gives way, and the texts are those of requests alone."""
    greedy = SamplingConfig(end_id=(), max_new_tokens=30, return_dict=True)
    prompts = [[3, 1, 4], [9, 8], [5, 6, 7, 5, 6], [2, 7, 1, 8, 2, 8]]
    asked = [config(20, top_k=2), greedy, config(20, top_k=3), greedy]
    alone = ModelRunner.from_dir(llama, batch_invariant=True)
    due = [alone.generate([each], one)["outputs"][0].tokens for each, one in zip(prompts, asked, strict=True)]
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 1, 0]):
        tight = KVCacheConfig(policy=policy, max_tokens=116, options={"admission": "optimistic"})
        runner = ModelRunner.from_dir(llama, kv_cache=tight, batch_invariant=True)
        outputs = runner.generate([prompts[i] for i in order], [asked[i] for i in order])["outputs"]
        assert [(one.finish_reason, one.tokens) for one in outputs] == [("length", due[i]) for i in order]
        assert sum(one.preemptions for one in outputs) > 0, "or there was room for all of them"
        loop = runner.generation.loop
        assert loop.cache.usage().free == loop.cache.usage().total
        loop.cache.policy.check_integrity()


@pytest.mark.parametrize("admission", ["worst_case", "optimistic"])
def test_alone_in_the_smallest_pool_that_takes_it(llama, admission):
    """6 blocks for each of 3 branches."""
    runner = ModelRunner.from_dir(llama, kv_cache=KVCacheConfig(max_tokens=72, options={"admission": admission}))
    (output,) = runner.generate([[3, 1, 4]], config(20, top_k=2))["outputs"]
    other = Session.from_directory(llama)
    assert list(output.tokens) == searched(lambda text: states_of(other, text), [3, 1, 4], 20, top_k=2)
    smaller = ModelRunner.from_dir(llama, kv_cache=KVCacheConfig(max_tokens=68, options={"admission": admission}))
    with pytest.raises(CapacityError, match="3 branches of 3 prompt tokens .* need 18 blocks of cache"):
        smaller.generate([[3, 1, 4]], config(20, top_k=2))


class Confused(ContrastiveSearch):
    """Names a slot that does not rest."""

    def looks(self, slots):
        return dict.fromkeys(slots, 1)


def test_a_decoder_that_asks_for_room_that_is_not_its_own():
    class Package:
        hook_api = "decoder>=1.0,<2"

        @hookimpl
        def trtllm_register_decoders(self, registrar):
            registrar.add("confused", Confused)

    runner = ModelRunner.from_engine(MarkovExecutable(build=LIMITS), plugins=Plugins.load(extra=[Package()]))
    configs = [
        config(),
        SamplingConfig(decoder=use("confused", top_k=2), end_id=(), max_new_tokens=5, return_dict=True),
    ]
    fine, bad = runner.generate([[5], [6]], configs)["outputs"]
    assert (fine.finish_reason, bad.finish_reason) == ("length", "plugin_error")
    assert "from looks, not tokens by resting slot" in str(bad.error)
