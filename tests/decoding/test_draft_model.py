"""Speculation with a draft model: a greedy text stays the same, and a drawn one keeps its distribution."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from trtllm_core import KVCacheConfig, ModelRunner, SamplingConfig, Session, use
from trtllm_core.config import BuildConfig
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import HostLogitsProcessor, LogitsCapabilities
from trtllm_core.testing.letters import letter_tokenizer
from trtllm_core.testing.markov import MarkovExecutable

VOCAB = 23
BUILD = BuildConfig(max_batch_size=8, max_input_len=40, max_seq_len=64, tokens_per_block=4)
GREEDY = SamplingConfig(end_id=(), max_new_tokens=16, return_dict=True)


def pair(vocab: int = VOCAB, blend: float = 0.6, build: BuildConfig = BUILD, **options):
    """A runner, and a draft engine that mostly agrees with it."""
    large = MarkovExecutable(vocab, seed=1, build=build, remembers=True)
    noise = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(2)) * 3
    small = MarkovExecutable(vocab, build=build, remembers=True, table=blend * large.table + (1 - blend) * noise)
    tokenizer = letter_tokenizer(vocab)
    return ModelRunner.from_engine(large, tokenizer=tokenizer, **options), Session.from_engine(small)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def assert_nothing_is_lost(runner):
    loop = runner.generation.loop
    assert loop.branches.slots.free == 8
    usage = loop.cache.usage()
    assert usage.free == usage.total
    (stage,) = [s for s in loop.branches.choosers._all.values() if s.name == "draft_model"]
    usage = stage.plugin._runs._cache.usage()
    assert usage.free == usage.total


@pytest.mark.parametrize("policy", ["paged", "prefix"])
def test_greedy_text_is_the_same_for_200_prompts(policy):
    runner, draft = pair(kv_cache=KVCacheConfig(policy=policy))
    texts = prompts(200)
    accepted = 0
    for start in range(0, 200, 8):
        some = texts[start : start + 8]
        plain = runner.generate(some, GREEDY)["outputs"]
        drafted = runner.generate(some, GREEDY, decoder=use("draft_model", session=draft))["outputs"]
        assert [one.tokens for one in drafted] == [one.tokens for one in plain]
        accepted += sum(one.accepted_tokens for one in drafted)
    assert accepted > 200 * 3, "or the drafts were no good, which would show little"
    assert_nothing_is_lost(runner)


def test_a_draft_engine_that_is_the_large_one_is_always_right():
    runner, draft = pair(blend=1.0)
    (one,) = runner.generate([[3, 4]], GREEDY, decoder=use("draft_model", session=draft, tokens=4))["outputs"]
    assert one.accepted_tokens == one.drafted_tokens == 12


class OnlyOdd(HostLogitsProcessor):
    capabilities = LogitsCapabilities(speculation="rewind")

    def mask(self, state, tokens, words):
        words.view("uint32")[:] = 0xAAAAAAAA
        return True


def test_processors_and_stops_take_part():
    runner, draft = pair()
    config = GREEDY.replace(
        repetition_penalty=1.3, no_repeat_ngram_size=3, stop_words_list=[[3], [7, 1]], stop_strings=["ba"]
    )
    for processor in (None, OnlyOdd()):
        plain = runner.generate(prompts(8), config, text=True, logits_processor=processor)["outputs"]
        decoder = use("draft_model", session=draft)
        drafted = runner.generate(prompts(8), config, text=True, logits_processor=processor, decoder=decoder)["outputs"]
        for one, other in zip(plain, drafted, strict=True):
            assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    assert {one.finish_reason for one in drafted} - {"length"}


@pytest.mark.parametrize("fields", [{"top_k": 0, "top_p": 1.0}, {"top_k": 3}, {"top_k": 0, "top_p": 0.7}])
def test_drawn_texts_keep_their_distribution(assert_distribution, reference, fields):
    """All texts of three tokens over a vocabulary of four, against their exact probabilities."""
    runner, draft = pair(vocab=4, blend=0.5)
    executable = runner.session.engine
    executable.table.mul_(0.4)
    draft.engine.table.mul_(0.4)
    decoder = use("draft_model", session=draft, tokens=2)
    counts = np.zeros((4, 4, 4))
    seeds = itertools.count()
    for _ in range(150):
        configs = [
            SamplingConfig(
                decoder=decoder, random_seed=next(seeds), end_id=(), max_new_tokens=4, return_dict=True, **fields
            )
            for _ in range(8)
        ]
        for one in runner.generate([[2]] * 8, configs)["outputs"]:
            counts[one.tokens[:3]] += 1
    exact = np.zeros((4, 4, 4))
    k, p = fields.get("top_k", 1), fields.get("top_p", 0.0)
    for text in itertools.product(range(4), repeat=3):
        chance = 1.0
        for at, token in enumerate(text):
            row = executable.table[executable.state_of(torch.tensor([2, *text[:at]]))[-1]].numpy()
            chance *= reference.distribution(row, k, p)[token]
        exact[text] = chance
    assert_distribution(counts.ravel(), exact.ravel())


def test_a_threshold_accepts_what_reaches_it():
    """With threshold 0 every draft is accepted: the text is the draft engine's."""
    runner, draft = pair()
    alone = ModelRunner.from_engine(draft.engine)
    expected = alone.generate([[5, 6]], GREEDY)["outputs"][0].tokens
    runner, draft = pair()
    config = GREEDY.replace(decoder=use("draft_model", session=draft, tokens=15), draft_acceptance_threshold=0.0)
    first = runner.generate([[5, 6]], GREEDY.replace(max_new_tokens=1))["outputs"][0].tokens
    alone = ModelRunner.from_engine(pair()[1].engine)
    expected = alone.generate([[5, 6, *first]], GREEDY.replace(max_new_tokens=14))["outputs"][0].tokens
    assert runner.generate([[5, 6]], config)["outputs"][0].tokens[:15] == first + expected


@pytest.mark.parametrize(
    ("vocab", "build", "words"),
    [
        (7, BUILD, "the draft engine has 7 tokens, the large one 23"),
        (VOCAB, BUILD.replace(max_batch_size=2), "built for 2 sequences of 64 tokens, the large one for 8 of 64"),
    ],
)
def test_a_draft_engine_that_cannot_follow_is_refused(vocab, build, words):
    runner, _ = pair()
    draft = Session.from_engine(MarkovExecutable(vocab, build=build))
    with pytest.raises(ConfigError, match=words):
        runner.generate([[1]], GREEDY, decoder=use("draft_model", session=draft))
    assert runner.session.engine.calls == 0


def test_a_session_has_one_draft_engine():
    runner, draft = pair()
    runner.generate([[1]], GREEDY, decoder=use("draft_model", session=draft))
    with pytest.raises(ConfigError, match="share one draft engine"):
        runner.generate([[1]], GREEDY, decoder=use("draft_model", session=pair()[1]))
    with pytest.raises(ConfigError, match="draft_model"):
        runner.explain(GREEDY.replace(decoder="draft_model"))
    assert runner.explain(GREEDY.replace(decoder=use("draft_model", session=draft))).digest()


@pytest.mark.parametrize("policy", ["paged", "prefix"])
@pytest.mark.parametrize(
    "fields", [{"decoder": "draft"}, {"decoder": "ngram"}, {"num_beams": 3}, {"num_return_sequences": 2, "top_k": 5}]
)
def test_who_is_put_off_goes_on_with_the_same_text(policy, fields):
    """Drafts, beams and several answers in a pool that is too small: their cache is taken away and computed anew."""
    beams = BUILD.replace(max_beam_width=fields.get("num_beams", 1))
    small = KVCacheConfig(policy=policy, max_tokens=112, options={"admission": "optimistic"})
    texts = []
    for kv_cache in (None, small):
        runner, draft = pair(build=beams, kv_cache=kv_cache)
        mine = fields | ({"decoder": use("draft_model", session=draft)} if fields.get("decoder") == "draft" else {})
        config = GREEDY.replace(max_new_tokens=24, **mine, **({"random_seed": 5} if "top_k" in mine else {}))
        outputs = runner.generate(prompts(6), config)["outputs"]
        texts.append([one.tokens for one in outputs])
        cache = runner.generation.loop.cache
        assert cache.usage().free == cache.usage().total
        cache.policy.check_integrity()
    assert texts[0] == texts[1]
    assert sum(one.preemptions for one in outputs) > 0, "or the test shows nothing"
