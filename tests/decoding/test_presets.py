"""The two presets: their orders as data, each against its origin, and both in one batch."""

from __future__ import annotations

import types
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.decoding.order import PRESETS, merged
from trtllm_core.decoding.pipeline import LogitsPipeline
from trtllm_core.decoding.planner import Planner
from trtllm_core.decoding.stages import CommittedRows
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import BranchView, DeviceLogitsProcessor, HostLogitsProcessor, Phase
from trtllm_core.testing.markov import MarkovExecutable

EVERYTHING = {
    "embedding_bias": {1: 1.0},
    "temperature": 0.7,
    "repetition_penalty": 1.2,
    "min_length": 2,
    "no_repeat_ngram_size": 3,
    "bad_words_list": [[1]],
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
}


@pytest.fixture(scope="module")
def plugins():
    return Plugins.load()


class Line:
    """A pipeline over a floor of slots, and requests in it."""

    def __init__(self, floor, plugins):
        self.floor, self.planner = floor, Planner(plugins)
        self.pipeline = LogitsPipeline(floor.context, 64, lambda slot: floor.histories[slot])

    def begin(self, slot, prompt, sampling, end_ids=(), processors=()):
        self.floor.view(slot, prompt)
        plan = self.planner.plan(sampling, processors, beside=self.pipeline.beside(sampling.preset))
        self.pipeline.begin(plan.processors, BranchView("r", 0, slot, tuple(prompt), sampling, end_ids, 0))
        return [item.name for item in plan.processors]

    def apply(self, logits, slots, scored=False):
        return self.pipeline.apply(
            logits, torch.tensor(slots), torch.zeros(len(slots), dtype=torch.int64), None, scored
        )

    def commit(self, slots, tokens):
        for slot, token in zip(slots, tokens, strict=True):
            self.floor.append(slot, [token])
        ones = torch.ones(len(slots), dtype=torch.int64)
        self.pipeline.commit_device(CommittedRows(torch.tensor(slots), torch.tensor(tokens)[:, None], ones))
        self.pipeline.commit_host(slots, [[token] for token in tokens])


@pytest.fixture
def line(new_floor, plugins):
    return lambda **sizes: Line(new_floor(**sizes), plugins)


# -- the orders --------------------------------------------------------------------------------------------------------


def test_the_field_names_the_presets():
    assert set(get_args(SamplingConfig.model_fields["preset"].annotation)) == set(PRESETS)


def test_the_classic_order(line):
    names = line().begin(0, [1], SamplingConfig(**EVERYTHING))
    penalties = ["penalties", "min_length", "no_repeat_ngram", "bad_words"]
    assert names == ["embedding_bias", "temperature", *penalties, "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]


def test_the_order_of_transformers(line):
    names = line().begin(0, [1], SamplingConfig(preset="hf", **EVERYTHING))
    warpers = ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"]
    assert names == ["embedding_bias", "penalties", "min_length", "no_repeat_ngram", "bad_words", *warpers]


def test_a_greedy_choice_takes_no_part_in_drawing(plugins):
    wish = {**EVERYTHING, "top_k": 1, "output_log_probs": True}
    classic, hf = (Planner(plugins).plan(SamplingConfig(preset=name, **wish)) for name in PRESETS)
    assert classic.decoder.name == hf.decoder.name == "greedy"
    assert "temperature" in [item.name for item in classic.processors], "log-probabilities see it"
    assert [item.name for item in hf.processors][-1] == "bad_words"
    assert "typical_p: left out, in preset hf it shapes drawn choices only" in hf.notes
    assert "min_p: left out, it cannot change which logit is largest" in classic.notes
    named = Planner(plugins).plan(SamplingConfig(preset="hf", logits_processors="typical_p", typical_p=0.5))
    assert "typical_p" in [item.name for item in named.processors]


@pytest.mark.parametrize(
    ("orders", "want"),
    [
        ({"a": "xyz"}, [("x", "a"), ("y", "a"), ("z", "a")]),
        ({"a": "xyz", "b": "xyz"}, [("x", "ab"), ("y", "ab"), ("z", "ab")]),
        ({"a": "btpm", "b": "bptm"}, None),
        ({"a": "btpcmq", "b": "pctkm", "c": "mt"}, None),
        ({"a": "", "b": "xy"}, [("x", "b"), ("y", "b")]),
    ],
)
def test_merged_orders_are_each_presets_own(orders, want):
    result = merged(orders)
    for name, order in orders.items():
        assert [key for key, names in result if name in names] == list(order)
    if want is not None:
        assert result == [(key, frozenset(names)) for key, names in want]


# -- against their origins ---------------------------------------------------------------------------------------------


class Theirs(GenerationMixin):
    """Makes the processors of ``generate()``, without a model."""

    config = types.SimpleNamespace(is_encoder_decoder=False)

    def processors(self, config, prompt_length):
        ends = config.eos_token_id
        config._eos_token_tensor = None if ends is None else torch.tensor([ends] if isinstance(ends, int) else ends)
        return self._get_logits_processor(config, prompt_length, device="cpu")


CONFIGS = [
    {"do_sample": True, "temperature": 0.7, "top_k": 10, "top_p": 0.8},
    {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.3, "min_p": 0.05},
    {"do_sample": True, "top_k": 0, "typical_p": 0.7, "repetition_penalty": 0.8, "sequence_bias": [[[3], 4.0]]},
    {"do_sample": True, "top_k": 0, "epsilon_cutoff": 0.02, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 6]},
    {"do_sample": True, "top_k": 30, "eta_cutoff": 0.05, "bad_words_ids": [[2], [1, 2], [3, 1], [4]]},
    {"do_sample": False, "temperature": 0.5, "top_p": 0.5, "typical_p": 0.5, "repetition_penalty": 1.2},
    {"do_sample": False, "min_length": 9, "no_repeat_ngram_size": 3, "bad_words_ids": [[1, 2, 3], [4]]},
    {"do_sample": True, "min_new_tokens": 4, "min_length": 7, "top_k": 3, "repetition_penalty": 1.1},
]  # fmt: skip


def test_hf_against_transformers(line, rng):
    """All of them in one batch, over eight steps."""
    vocab, n = 12, len(CONFIGS)
    row = line(slots=n, vocab=vocab, padded=vocab)
    theirs = []
    prompts = [rng.integers(0, 6, rng.integers(2, 7)).tolist() for _ in CONFIGS]
    for slot, (wish, prompt) in enumerate(zip(CONFIGS, prompts, strict=True)):
        config = GenerationConfig(max_new_tokens=20, eos_token_id=[4, 7], **wish)
        # ``generate`` fills in its own defaults before it makes the processors.
        full = GenerationConfig(**{"top_k": 50, **config.to_diff_dict()})
        theirs.append(Theirs().processors(full, len(prompt)))
        sampling = SamplingConfig.from_hf(config)
        row.begin(slot, prompt, sampling, sampling.end_id)
    for _ in range(8):
        raw = torch.from_numpy(rng.normal(0, 2, (n, vocab)).astype(np.float32))
        order = rng.permutation(n).tolist()
        got = row.apply(raw[order], order).logits
        for slot, mine in zip(order, got, strict=True):
            want = theirs[slot](torch.tensor([row.floor.histories[slot]]), raw[slot][None].clone())[0]
            torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)
        row.commit(list(range(n)), rng.integers(0, 6, n).tolist())


def test_trtllm_against_appendix_a(line, reference, rng):
    vocab, end_ids = 12, (4, 7)
    wishes = [
        {"temperature": 0.7, "repetition_penalty": 1.3, "embedding_bias": {2: 1.0}, "min_length": 3},
        {"temperature": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.2, "prompt_ignore_length": 2},
        {"no_repeat_ngram_size": 2, "bad_words_list": [[1], [2, 3]], "temperature": 0.5, "repetition_penalty": 0.7},
    ]
    row = line(slots=3, vocab=vocab, padded=vocab)
    prompts = [rng.integers(0, 6, 5).tolist() for _ in wishes]
    samplings = [SamplingConfig(top_k=0, top_p=0.9, **wish) for wish in wishes]
    for slot in range(3):
        row.begin(slot, prompts[slot], samplings[slot], end_ids)
    for _ in range(6):
        raw = rng.normal(0, 2, (3, vocab)).astype(np.float32)
        got = row.apply(torch.from_numpy(raw), [0, 1, 2]).logits.numpy()
        for slot, s in enumerate(samplings):
            ids = row.floor.histories[slot]
            x = reference.temperature(reference.bias(raw[slot], s.embedding_bias or {}), s.temperature)
            penalties = s.repetition_penalty, s.presence_penalty, s.frequency_penalty, s.prompt_ignore_length
            x = reference.penalties(x, ids, *penalties)
            x = reference.min_length(x, len(ids) - 5, s.min_length, end_ids)
            x = reference.bad_words(reference.no_repeat_ngram(x, ids, s.no_repeat_ngram_size), ids, s.bad_words_list)
            np.testing.assert_allclose(got[slot], x, rtol=3e-6, atol=1e-6)
        row.commit([0, 1, 2], rng.integers(0, 6, 3).tolist())


# -- both in one batch -------------------------------------------------------------------------------------------------


class Shift(HostLogitsProcessor):
    """Stands with the temperature: before the penalties in one preset, after them in the other. Counts its calls."""

    phase = Phase.TEMPERATURE

    def __init__(self):
        self.calls = 0

    def mask(self, state, tokens, words):
        words.view("uint32")[0] &= ~(1 << (len(tokens) % 8))
        return True

    def process(self, state, tokens, logits):
        self.calls += 1
        logits += 2.0


@pytest.mark.parametrize("host", [False, True])
def test_presets_in_one_batch_are_what_they_are_alone(line, rng, host):
    wishes = [SamplingConfig(preset=("trtllm", "hf")[i % 2], **EVERYTHING).replace(top_k=5 + i) for i in range(6)]
    prompts = [rng.integers(0, 6, 4).tolist() for _ in wishes]
    together, apart = line(), [line() for _ in wishes]
    shift = Shift()
    for slot in rng.permutation(6).tolist():
        together.begin(slot, prompts[slot], wishes[slot], (3,), [shift] if host else [])
        apart[slot].begin(slot, prompts[slot], wishes[slot], (3,), [Shift()] if host else [])
    for _ in range(4):
        raw = torch.from_numpy(rng.normal(0, 2, (6, 44)).astype(np.float32))
        slots = rng.permutation(6)[: rng.integers(2, 7)].tolist()
        together.pipeline.prepare(slots)
        got = together.apply(raw[slots], slots, scored=True)
        for i, slot in enumerate(slots):
            alone = apart[slot].apply(raw[slot][None], [slot], scored=True)
            assert torch.equal(got.logits[i], alone.logits[0])
            assert torch.equal(got.scores[i], alone.scores[0])
        tokens = rng.integers(0, 6, len(slots)).tolist()
        together.commit(slots, tokens)
        for slot, token in zip(slots, tokens, strict=True):
            apart[slot].commit([slot], [token])
    together.pipeline.end([1])
    together.pipeline.end([3, 5])
    assert len(together.pipeline._passes) == len(together.pipeline.live), "the others' order is gone with them"


def test_log_probabilities_see_what_the_preset_says(line, rng):
    classic, hf = (SamplingConfig(preset=name, top_k=0, top_p=1.0, temperature=0.5, min_p=0.5) for name in PRESETS)
    row = line()
    row.begin(0, [1], classic)
    row.begin(1, [1], hf)
    raw = torch.from_numpy(rng.normal(0, 2, (2, 44)).astype(np.float32))
    got = row.apply(raw, [0, 1], scored=True)
    assert got.logits.isinf().any(dim=1).all()
    torch.testing.assert_close(got.scores[0], raw[0] / (0.5 + 1e-6))
    assert torch.equal(got.scores[1], got.logits[1])
    unasked = row.apply(raw, [0, 1])
    assert unasked.scores is unasked.logits


class Fails(DeviceLogitsProcessor):
    phase = Phase.TEMPERATURE

    def apply(self, logits, batch):
        logits += 100
        raise RuntimeError("broken")


def test_a_failure_at_two_places_leaves_the_others_untouched(line, rng):
    row, alone = line(), line()
    fails = Fails()
    for slot, name in enumerate(("trtllm", "hf", "trtllm", "hf")):
        sampling = SamplingConfig(preset=name, top_k=0, top_p=0.9, temperature=0.5, repetition_penalty=1.5)
        row.begin(slot, [1, 2], sampling, processors=[fails] if slot < 2 else [])
        alone.begin(slot, [1, 2], sampling)
    raw = torch.from_numpy(rng.normal(0, 2, (4, 44)).astype(np.float32))
    got, want = row.apply(raw, [0, 1, 2, 3]).logits.clone(), alone.apply(raw, [0, 1, 2, 3]).logits
    assert torch.equal(got, want)
    assert set(row.pipeline.take_failures()) == {0, 1}


class Left(DeviceLogitsProcessor):
    after = ("temperature",)
    phase = Phase.PENALTY

    def apply(self, logits, batch):
        return None


def test_an_order_that_a_preset_cannot_keep_is_refused_for_it_alone(line):
    """After the temperature is where the penalties are in one preset only."""
    row = line()
    classic = SamplingConfig(top_k=0, top_p=0.9, temperature=0.5)
    row.begin(0, [1], classic, processors=[Left()])
    with pytest.raises(ConfigError, match="'temperature' .*asks to run before|'Left'"):
        row.begin(1, [1], classic.replace(preset="hf"), processors=[Left()])
    row.begin(1, [1], classic.replace(preset="hf"))


def test_whole_generations_of_both_presets_in_one_batch(plugins):
    runner = ModelRunner.from_engine(MarkovExecutable(), plugins=plugins)
    base = SamplingConfig(
        top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.3, random_seed=3, end_id=(), max_new_tokens=12,
        output_log_probs=True, return_dict=True,
    )  # fmt: skip
    configs = [base, base.replace(preset="hf"), base.replace(preset="hf", decoder=use("mirostat", tau=2.0))]
    together = runner.generate([[5]] * 3, configs)["outputs"]
    for config, out in zip(configs, together, strict=True):
        alone = runner.generate([[5]], config)["outputs"][0]
        assert (alone.tokens, alone.log_probs) == (out.tokens, out.log_probs)
    assert len({out.tokens for out in together}) == 3
