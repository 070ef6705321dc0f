"""Beam search: the classic semantics against a plain reference, and those of transformers against transformers."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from trtllm_core import KVCacheConfig, ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.config import BuildConfig
from trtllm_core.decoding.hf_beams import HFBeamSample
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.testing.letters import letter_tokenizer, pieces
from trtllm_core.testing.markov import MarkovExecutable

VOCAB = 23
BUILD = BuildConfig(max_batch_size=4, max_beam_width=6, max_input_len=32, max_seq_len=48, tokens_per_block=4)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """A model whose logits depend on the whole text, so that a fork that goes wrong shows."""
    return ModelRunner.from_engine(MarkovExecutable(VOCAB, seed=3, build=BUILD, remembers=True), plugins=Plugins.load())


class Model:
    """The same model, one text at a time."""

    def __init__(self, executable: MarkovExecutable) -> None:
        self.executable = executable

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        return self.executable.table[self.executable.state_of(torch.tensor(tokens))[-1]]


def norm(score: float, length: int, penalty: float) -> float:
    return score if penalty == 0 or length == 1 else score / length**penalty


def classic(model: Model, prompt: list[int], config: SamplingConfig) -> list[tuple[list[int], float, float]]:
    """Beam search as §1.13 describes the classic one: tokens, cumulated and normed score of each sequence."""
    array = config.beam_width_array or (config.num_beams,)
    penalty, limit = config.length_penalty, config.max_new_tokens
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float, float]] = []
    for step in itertools.count():
        width = array[min(step, len(array) - 1)]
        candidates = []
        for number, (tokens, score) in enumerate(beams):
            x = model(prompt + tokens).clone()
            if step < config.min_length:
                x[list(config.end_id)] = torch.finfo(x.dtype).min
            x = x * (1 / (config.temperature + 1e-6)) if config.temperature != 1 else x
            chances = x.log_softmax(-1)
            bonus = config.beam_search_diversity_rate * number
            best = sorted(range(len(x)), key=lambda t: (-float(chances[t]), t))[: 2 * width]
            candidates += [
                (score + float(chances[t]) + bonus, number, tokens, t) for t in best if float(chances[t]) > -1e30
            ]
        candidates.sort(key=lambda one: -one[0])
        beams = []
        for rank, (score, _, tokens, token) in enumerate(candidates[: 2 * width]):
            if token in config.end_id:
                if rank < width:
                    finished.append(([*tokens, token], score, norm(score, step + 1, penalty)))
            elif len(beams) < width:
                beams.append(([*tokens, token], score))
        finished.sort(key=lambda one: -one[2])
        del finished[max(array) :]
        if len(finished) >= width:
            length = limit if config.early_stopping not in (0, 1) and penalty > 0 else step + 1
            enough = config.early_stopping == 1 or finished[width - 1][2] >= norm(beams[0][1], length, penalty)
            if enough:
                break
        if step + 1 == limit:
            finished += [(tokens, score, norm(score, limit, penalty)) for tokens, score in beams]
            break
    finished.sort(key=lambda one: -one[2])
    return finished[: array[-1]]


def random_case(rng: random.Random) -> dict:
    return {
        "num_beams": rng.choice([2, 3, 4, 6]),
        "length_penalty": rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]),
        "early_stopping": rng.choice([0, 1, 2]),
        "max_new_tokens": rng.choice([1, 4, 9, 14]),
        "end_id": tuple(rng.sample(range(VOCAB), rng.choice([1, 2, 4]))),
        "min_length": rng.choice([0, 1, 3]),
        "temperature": rng.choice([1.0, 0.6, 1.7]),
    }


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.choice([1, 4, 7]))]


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_a_plain_reference_whatever_the_widths_in_a_batch(runner, seed):
    rng = random.Random(seed)
    model = Model(runner.session.engine)
    for _ in range(6):
        prompts, configs = [random_prompt(rng) for _ in range(4)], []
        for _ in prompts:
            fields = random_case(rng)
            if rng.random() < 0.3:
                fields["beam_search_diversity_rate"] = 0.4
            if rng.random() < 0.3:
                fields["beam_width_array"] = tuple(rng.choice([(2, 4), (3, 6, 2), (1, 5)]))
                del fields["num_beams"]
            configs.append(SamplingConfig(return_dict=True, **fields))
        outputs = iter(runner.generate(prompts, configs)["outputs"])
        for prompt, config in zip(prompts, configs, strict=True):
            expected = classic(model, prompt, config)
            got = list(itertools.islice(outputs, len(expected)))
            assert [list(one.tokens) for one in got] == [tokens for tokens, _, _ in expected], config
            for one, (_, total, score) in zip(got, expected, strict=True):
                assert one.cum_log_prob == pytest.approx(total, abs=1e-4)
                assert one.score == pytest.approx(score, abs=1e-4)
        assert next(outputs, None) is None
    usage = runner.generation.loop.cache.usage()
    assert usage.free == usage.total


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(runner):
    """The same model for transformers."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import CausalLMOutput

    executable = runner.session.engine

    class Remembers(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask=None, **kwargs):
            return CausalLMOutput(logits=executable.table[executable.state_of(input_ids)])

        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {"input_ids": input_ids}

    return Remembers(transformers.PretrainedConfig(vocab_size=VOCAB))


def hf_generate(model, prompt, **fields):
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        use_cache=False,
        pad_token_id=VOCAB + 1,
        return_dict_in_generate=True,
        output_scores=True,
        **fields,
    )
    rows = [[t for t in row.tolist() if t != VOCAB + 1] for row in out.sequences[:, len(prompt) :]]
    return rows, out.sequences_scores.tolist()


NAMES = {0: False, 1: True, 2: "never"}


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@pytest.mark.parametrize("seed", range(5))
def test_the_hf_preset_equals_transformers(runner, theirs, seed):
    """20 cases each, four at a time in one batch of different widths."""
    rng = random.Random(100 + seed)
    for _ in range(5):
        prompts, configs, expected = [], [], []
        for _ in range(4):
            prompt, fields = random_prompt(rng), random_case(rng)
            fields |= {"temperature": 1.0, "min_length": 0, "num_return_sequences": rng.randint(1, fields["num_beams"])}
            ngram = rng.choice([0, 0, 2])
            repetition = rng.choice([1.0, 1.0, 1.3])
            length = rng.choice([0, 0, 3])
            prompts.append(prompt)
            configs.append(
                SamplingConfig(
                    decoder="hf_beam_search",
                    no_repeat_ngram_size=ngram,
                    repetition_penalty=repetition,
                    return_dict=True,
                    **fields | {"min_length": length},
                )
            )
            expected.append(
                hf_generate(
                    theirs,
                    prompt,
                    num_beams=fields["num_beams"],
                    num_return_sequences=fields["num_return_sequences"],
                    length_penalty=fields["length_penalty"],
                    early_stopping=NAMES[fields["early_stopping"]],
                    max_new_tokens=fields["max_new_tokens"],
                    eos_token_id=list(fields["end_id"]),
                    no_repeat_ngram_size=ngram,
                    repetition_penalty=repetition,
                    min_new_tokens=length or None,
                    do_sample=False,
                )
            )
        outputs = iter(runner.generate(prompts, configs)["outputs"])
        for config, (rows, scores) in zip(configs, expected, strict=True):
            got = list(itertools.islice(outputs, len(rows)))
            assert [list(one.tokens) for one in got] == rows, config
            assert [one.score for one in got] == pytest.approx(scores, abs=1e-4)


# -- groups -----------------------------------------------------------------------------------------------------------


def diverse(model: Model, prompt: list[int], config: SamplingConfig, groups: int, penalty: float):
    """Group beam search as transformers had it: tokens and score of each sequence."""
    size, end = config.num_beams // groups, config.end_id
    beams: list[list[tuple[list[int], float]]] = [[([], 0.0)] for _ in range(groups)]
    finished: list[list[tuple[list[int], float]]] = [[] for _ in range(groups)]
    done = [False] * groups

    def score(total: float, length: int) -> float:
        return total / length**config.length_penalty

    for length in range(1, config.max_new_tokens + 1):
        taken: list[int] = []
        for g in range(groups):
            if done[g]:
                continue
            candidates = []
            for tokens, total in beams[g]:
                chances = model(prompt + tokens).log_softmax(-1)
                for t in range(VOCAB):
                    candidates.append((total + float(chances[t]) - penalty * taken.count(t), tokens, t))
            candidates.sort(key=lambda one: -one[0])
            weighed = candidates[: max(2, 1 + len(end)) * size]
            beams[g] = []
            for rank, (total, tokens, token) in enumerate(weighed):
                if token in end:
                    if rank < size:
                        finished[g].append(([*tokens, token], score(total, length)))
                elif len(beams[g]) < size:
                    beams[g].append(([*tokens, token], total))
            finished[g] = sorted(finished[g], key=lambda one: -one[1])[:size]
            taken += [tokens[-1] for tokens, _ in beams[g]]
            if len(finished[g]) == size:
                at = config.max_new_tokens if config.early_stopping == 2 and config.length_penalty > 0 else length
                done[g] = config.early_stopping == 1 or finished[g][-1][1] >= score(weighed[0][0], at)
        if all(done):
            break
    for g in range(groups):
        if not done[g]:
            finished[g] += [(tokens, score(total, config.max_new_tokens)) for tokens, total in beams[g]]
            finished[g] = sorted(finished[g], key=lambda one: -one[1])[:size]
    best = sorted((one for each in finished for one in each), key=lambda one: -one[1])
    return best[: config.num_return_sequences]


@pytest.mark.parametrize("seed", range(2))
def test_groups_equal_a_plain_reference(runner, seed):
    rng = random.Random(200 + seed)
    model = Model(runner.session.engine)
    for _ in range(6):
        prompts, configs, ways = [], [], []
        for _ in range(3):
            fields = random_case(rng) | {"temperature": 1.0, "min_length": 0, "num_beams": rng.choice([2, 4, 6])}
            groups = rng.choice([1, 2] if fields["num_beams"] != 6 else [2, 3])
            ways.append((groups, rng.choice([0.0, 0.7, 2.0])))
            decoder = use("diverse_beam_search", groups=groups, penalty=ways[-1][1])
            fields["num_return_sequences"] = fields["num_beams"]
            prompts.append(random_prompt(rng))
            configs.append(SamplingConfig(decoder=decoder, return_dict=True, **fields))
        outputs = iter(runner.generate(prompts, configs)["outputs"])
        for prompt, config, way in zip(prompts, configs, ways, strict=True):
            expected = diverse(model, prompt, config, *way)
            got = list(itertools.islice(outputs, len(expected)))
            assert [one.score for one in got] == pytest.approx([score for _, score in expected], abs=1e-4), config
            assert [list(one.tokens) for one in got] == [tokens for tokens, _ in expected], (config, way)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_beam_sampling_draws_without_replacement(new_floor, assert_distribution):
    """Four of six tokens are drawn, and the best two of them are the beams: all pairs, against their exact chances."""
    slots, vocab, rounds = 64, 6, 50
    floor = new_floor(slots=slots, vocab=vocab, padded=vocab, max_seq_len=rounds + 2)
    decoder = HFBeamSample()
    decoder.setup(floor.context)
    for slot in range(slots):
        view = floor.view(slot, [slot % vocab], num_beams=2, max_new_tokens=rounds)
        decoder.begin(slot, dataclasses.replace(view, request_id=str(slot)))
    chances = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.07, 0.03]).log()
    counts: dict[tuple[int, ...], int] = collections.Counter()
    for _ in range(rounds):
        found = decoder.select(chances.repeat(slots, 1), floor.logits_batch(list(range(slots))))
        for drawn in found.tokens.view(slots, 4).tolist():
            assert drawn == sorted(drawn), "by score"
            counts[tuple(drawn[:2])] += 1
        for slot in range(slots):
            floor.append(slot, [0])
    p = chances.exp().tolist()
    exact: dict[tuple[int, ...], float] = collections.Counter()
    for order in itertools.permutations(range(vocab), 4):
        chance, left = 1.0, 1.0
        for token in order:
            chance *= p[token] / left
            left -= p[token]
        exact[tuple(sorted(order)[:2])] += chance
    pairs = sorted(exact)
    assert_distribution(np.array([counts[pair] for pair in pairs]), np.array([exact[pair] for pair in pairs]))


def test_beam_sampling_repeats_with_its_seed_and_in_any_company(runner):
    config = SamplingConfig(
        decoder="hf_beam_sample", num_beams=4, num_return_sequences=4, random_seed=5, end_id=(1,), return_dict=True
    )
    alone = runner.generate([[3, 4]], config)["outputs"]
    other = config.replace(random_seed=6)
    both = runner.generate([[3, 4], [3, 4]], [other, config])["outputs"]
    assert [one.tokens for one in both[4:]] == [one.tokens for one in alone]
    assert [one.tokens for one in both[:4]] != [one.tokens for one in alone]


# -- results ----------------------------------------------------------------------------------------------------------


def test_results_have_a_row_for_each_beam(runner):
    config = SamplingConfig(
        num_beams=3,
        end_id=(2, 7),
        max_new_tokens=12,
        early_stopping=0,
        return_dict=True,
        output_log_probs=True,
        output_cum_log_probs=True,
        output_sequence_lengths=True,
    )
    prompt = [5, 6]
    out = runner.generate([prompt], config)
    assert out["output_ids"].shape == (1, 3, 14)
    model = Model(runner.session.engine)
    for number, one in enumerate(out["outputs"]):
        texts = [prompt + list(one.tokens[:i]) for i in range(len(one.tokens))]
        scores = [model(text).clone() for text in texts]
        scores[0][[2, 7]] = torch.finfo(torch.float32).min  # min_length is 1
        chances = [float(x.log_softmax(-1)[token]) for x, token in zip(scores, one.tokens, strict=True)]
        assert list(one.log_probs) == pytest.approx(chances, abs=1e-5)
        row = out["log_probs"][0, number, 2 : 2 + len(one.tokens)]
        assert row.tolist() == pytest.approx(chances, abs=1e-5)
        assert float(out["cum_log_probs"][0, number]) == pytest.approx(sum(chances), abs=1e-4)
        assert int(out["sequence_lengths"][0, number]) == one.length
        assert one.length == 2 + len(one.tokens) - (one.finish_reason == "end_id")
    assert {one.finish_reason for one in out["outputs"]} >= {"end_id"}


def test_the_number_of_sequences_is_the_presets(runner):
    """The classic runtime returned its beams, transformers one sequence unless told otherwise."""
    config = SamplingConfig(num_beams=4, end_id=(), max_new_tokens=3, return_dict=True)
    assert len(runner.generate([[1]], config)["outputs"]) == 4
    assert len(runner.generate([[1]], config.replace(num_return_sequences=1))["outputs"]) == 1
    assert len(runner.generate([[1]], config.replace(decoder="hf_beam_search"))["outputs"]) == 1
    array = SamplingConfig(beam_width_array=(2, 6, 3), end_id=(), max_new_tokens=3, return_dict=True)
    assert len(runner.generate([[1]], array)["outputs"]) == 3


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"num_beams": 7}, CapacityError, "7 branches, .* max_beam_width 6"),
        ({"num_beams": 2, "num_return_sequences": 3}, ConfigError, "2 beams returns at most 2"),
        ({"beam_width_array": (2, 4), "num_beams": 3}, ConfigError, "not the largest of beam_width_array"),
        ({"beam_width_array": (0, 4)}, ConfigError, "each width is 1 to 64"),
        ({"num_beams": 2, "use_beam_hyps": False, "length_penalty": 0.5}, ConfigError, "'beam_search', .* would"),
        ({"num_beams": 2, "use_beam_hyps": False, "early_stopping": 0}, ConfigError, "honours early_stopping=0"),
        ({"num_beams": 2, "use_beam_hyps": False, "preset": "hf"}, ConfigError, "'plain_beam_search' would"),
        ({"decoder": use("diverse_beam_search", groups=3), "num_beams": 4}, ConfigError, "3 groups cannot share"),
        ({"decoder": "hf_beam_search", "beam_search_diversity_rate": 0.5}, ConfigError, "beam_search_diversity_rate"),
    ],
)
def test_what_a_search_does_not_do_is_refused_before_the_first_token(runner, fields, error, words):
    calls = runner.session.engine.calls
    with pytest.raises(error, match=words):
        runner.generate([[1]], SamplingConfig(**fields))
    assert runner.session.engine.calls == calls


# -- without hypotheses -----------------------------------------------------------------------------------------------


def in_places(model: Model, prompt: list[int], config: SamplingConfig) -> list[tuple[list[int], float, bool]]:
    """Beam search in places, from the words alone: tokens, cumulated score and whether it ended, place by place."""
    array = config.beam_width_array or (config.num_beams,)
    places: list[tuple[list[int], float, bool]] = [([], 0.0, False)]
    for step in range(config.max_new_tokens):
        width = array[min(step, len(array) - 1)]
        found = []
        for number, (tokens, score, ended) in enumerate(places):
            if ended:
                found.append((-score, 0, number, tokens, True))
                continue
            x = model(prompt + tokens).clone()
            if step < config.min_length:
                x[list(config.end_id)] = torch.finfo(x.dtype).min
            chances = x.log_softmax(-1).tolist()
            for token in sorted(range(len(x)), key=lambda t: (-chances[t], t))[:width]:
                total = score + chances[token] + config.beam_search_diversity_rate * number
                found.append((-total, 1, number, [*tokens, token], token in config.end_id))
        best = sorted(found, key=lambda one: one[:3])[:width]
        places = [(tokens, -negative, ended) for negative, _, _, tokens, ended in best]
        if all(ended for _, _, ended in places):
            break
    return places


@pytest.mark.parametrize("seed", range(3))
def test_without_hypotheses_a_finished_beam_stays_in_its_place(runner, seed):
    rng = random.Random(seed)
    model, early, displaced = Model(runner.session.engine), 0, 0
    for _ in range(8):
        prompts, configs = [random_prompt(rng) for _ in range(4)], []
        for _ in prompts:
            fields = {name: random_case(rng)[name] for name in ("num_beams", "max_new_tokens", "end_id", "min_length")}
            fields["beam_search_diversity_rate"] = rng.choice([0.0, 0.0, 0.3])
            if rng.random() < 0.3:
                fields["beam_width_array"], fields["num_beams"] = (2, 6, 3), 6
            configs.append(SamplingConfig(use_beam_hyps=False, return_dict=True, **fields))
        outputs = runner.generate(prompts, configs)["outputs"]
        for number, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
            mine = [one for one in outputs if one.request_id == str(number)]
            due = in_places(model, prompt, config)
            assert [list(one.tokens) for one in mine] == [tokens for tokens, _, _ in due]
            assert [one.cum_log_prob for one in mine] == pytest.approx([score for _, score, _ in due], abs=1e-4)
            assert [one.score for one in mine] == [one.cum_log_prob for one in mine]
            assert [one.finish_reason == "end_id" for one in mine] == [ended for _, _, ended in due]
            early += any(ended and len(tokens) < config.max_new_tokens for tokens, _, ended in due)
            kept = runner.generate([prompt], config.replace(use_beam_hyps=True))["outputs"]
            displaced += {one.tokens for one in kept} != {one.tokens for one in mine}
    assert early > 5
    assert displaced > 3, "or keeping them aside would be the same"


def test_streams_without_hypotheses_end_as_the_result(runner):
    config = SamplingConfig(num_beams=4, use_beam_hyps=False, end_id=(1, 5, 9), max_new_tokens=12, return_dict=True)
    for prompt in ([3, 4], [7], [2, 2, 8]):
        told: dict[int, list[int]] = {}
        for delta in runner.generate([prompt], config, streaming=True):
            tokens = told.setdefault(delta.sequence, [])
            if delta.keep is not None:
                del tokens[delta.keep :]
            tokens.extend(delta.tokens)
        result = runner.generate([prompt], config)["outputs"]
        assert told == {one.sequence: list(one.tokens) for one in result}
    first = runner.generate([[7]], config.replace(num_return_sequences=1))["outputs"]
    assert [one.tokens for one in first] == [runner.generate([[7]], config)["outputs"][0].tokens]


def test_without_hypotheses_other_stops_end_a_beam_too():
    engine = MarkovExecutable(VOCAB, seed=3, build=BUILD, remembers=True)
    runner = ModelRunner.from_engine(engine, tokenizer=letter_tokenizer(VOCAB), debug_mode=True)
    config = SamplingConfig(num_beams=4, use_beam_hyps=False, end_id=(), max_new_tokens=12, return_dict=True)
    free = runner.generate([[7]], config)["outputs"]
    word = list(free[0].tokens[2:4])
    stopped = runner.generate([[7]], config.replace(stop_words_list=[word]))["outputs"]
    assert "stop_words" in {one.finish_reason for one in stopped}
    for one in stopped:
        ends = one.finish_reason == "stop_words"
        places = [i for i in range(len(one.tokens) - 1) if list(one.tokens[i : i + 2]) == word]
        assert places == ([len(one.tokens) - 2] if ends else [])
    assert [one.cum_log_prob for one in stopped] == sorted((one.cum_log_prob for one in stopped), reverse=True)


# -- all of it together -----------------------------------------------------------------------------------------------


def with_penalty_and_stop(
    model: Model, prompt: list[int], width: int, limit: int, penalty: float, stop: str
) -> list[tuple[list[int], float, str]]:
    """Beam search under a repetition penalty and a stop string, from the words alone: tokens, score and text."""
    letters = pieces(VOCAB)
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float, str]] = []
    for length in range(1, limit + 1):
        candidates = []
        for tokens, score in beams:
            x = model(prompt + tokens).clone()
            for t in set(prompt + tokens):
                x[t] = x[t] * penalty if x[t] < 0 else x[t] / penalty
            chances = x.log_softmax(-1)
            candidates += [(score + float(chances[t]), [*tokens, t]) for t in range(VOCAB)]
        candidates.sort(key=lambda one: -one[0])
        beams = []
        for rank, (score, tokens) in enumerate(candidates[: 2 * width]):
            text = "".join(letters[t] for t in tokens)
            if stop in text:
                if rank < width:
                    finished.append((tokens, score / length, text[: text.index(stop)]))
            elif len(beams) < width:
                beams.append((tokens, score))
        finished.sort(key=lambda one: -one[1])
        if len(finished) >= width:
            break
    else:
        finished += [(tokens, score / limit, "".join(letters[t] for t in tokens)) for tokens, score in beams]
    return sorted(finished, key=lambda one: -one[1])[:width]


def test_beams_with_a_penalty_and_a_stop_string_over_a_prefix_that_is_reused():
    """Counts follow the forks, beams that run into the string are hypotheses, the text is cut, blocks are reused."""
    executable = MarkovExecutable(VOCAB, seed=3, build=BUILD, remembers=True)
    runner = ModelRunner.from_engine(
        executable, tokenizer=letter_tokenizer(VOCAB), kv_cache=KVCacheConfig(policy="prefix")
    )
    model, rng = Model(executable), random.Random(7)
    shared = [rng.randrange(VOCAB) for _ in range(13)]
    config = SamplingConfig(
        num_beams=4, repetition_penalty=1.4, stop_strings=["ba"], end_id=(), max_new_tokens=14, return_dict=True
    )
    reasons: set[str] = set()
    for turn in range(4):
        prompts = [[*shared, *random_prompt(rng)] for _ in range(3)]
        outputs = iter(runner.generate(prompts, config, text=True)["outputs"])
        streamed: dict[tuple[str, int], tuple[list[int], str]] = {}
        for delta in runner.generate(prompts, config, streaming=True, text=True):
            tokens, text = streamed.get((delta.request_id, delta.sequence), ([], ""))
            if delta.keep is not None:
                tokens, text = tokens[: delta.keep], text[: delta.keep_text]
            streamed[delta.request_id, delta.sequence] = [*tokens, *delta.tokens], text + delta.text
        for prompt in prompts:
            for tokens, score, text in with_penalty_and_stop(model, prompt, 4, 14, 1.4, "ba"):
                one = next(outputs)
                assert (list(one.tokens), one.text) == (tokens, text)
                assert streamed[one.request_id, one.sequence] == (tokens, text)
                assert one.score == pytest.approx(score, abs=1e-4)
                assert turn == 0 or one.cached_prompt_tokens >= 12
                reasons.add(one.finish_reason)
    assert reasons == {"stop_string", "length"}
    cache = runner.generation.loop.cache
    assert cache.usage().free == cache.usage().total
    cache.policy.check_integrity()
