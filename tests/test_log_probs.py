"""Log-probabilities in results and in streams: of the chosen tokens, and of the likeliest beside them."""

from __future__ import annotations

import math

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.decoding.beam_search import BeamSearch
from trtllm_core.decoding.scoring import scored
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import hookimpl
from trtllm_core.testing.markov import MarkovExecutable

BASE = SamplingConfig(top_k=0, top_p=0.9, temperature=0.7, random_seed=4, end_id=(), max_new_tokens=6, return_dict=True)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable(), plugins=Plugins.load())


def expected(runner, prompt, tokens, temperature=0.7 + 1e-6):
    last = [prompt[-1], *tokens[:-1]]
    return (runner.session.engine.table[last] / temperature).log_softmax(1)


def test_the_likeliest_beside_each_token(runner):
    configs = [BASE.replace(num_logprobs=n, random_seed=n) for n in (3, 0, 5)]
    result = runner.generate([[5], [6], [7]], configs)
    for n, prompt, out in zip((3, 0, 5), ([5], [6], [7]), result["outputs"], strict=True):
        if not n:
            assert out.top_log_probs == out.log_probs == ()
            continue
        table = expected(runner, prompt, out.tokens)
        for row, token, log_prob, beside in zip(table, out.tokens, out.log_probs, out.top_log_probs, strict=True):
            best = row.topk(n)
            assert list(beside) == best.indices.tolist()
            assert list(beside.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
            assert log_prob == pytest.approx(float(row[token]), abs=1e-5)
            assert beside.get(token, log_prob) == pytest.approx(log_prob, abs=1e-6)
    assert result["top_log_probs"][2][0] == result["outputs"][2].top_log_probs


@pytest.mark.parametrize("sequences", [1, 3])
def test_streams_tell_what_results_hold(runner, sequences):
    config = BASE.replace(num_logprobs=2, output_cum_log_probs=True, num_return_sequences=sequences)
    outputs = runner.generate([[5]], config)["outputs"]
    told = {number: ([], [], []) for number in range(sequences)}
    for delta in runner.generate([[5]], config, streaming=True):
        for kept, new in zip(told[delta.sequence], (delta.tokens, delta.log_probs, delta.top_log_probs), strict=True):
            kept.extend(new)
    for out in outputs:
        assert told[out.sequence] == (list(out.tokens), list(out.log_probs), list(out.top_log_probs))
        assert out.cum_log_prob == pytest.approx(sum(out.log_probs), abs=1e-5)


def test_log_probs_are_of_the_whole_vocabulary_in_the_classic_preset_alone(runner):
    """Whatever truncates does not show in them; in transformers' preset it does."""
    classic, hf = (
        runner.generate([[5]], BASE.replace(preset=name, min_p=0.2, top_k=3, output_log_probs=True))["outputs"][0]
        for name in ("trtllm", "hf")
    )
    table = expected(runner, [5], classic.tokens)
    chosen = table[range(6), list(classic.tokens)]
    assert classic.log_probs == pytest.approx(chosen.tolist(), abs=1e-5)
    full = expected(runner, [5], hf.tokens, 0.7)[0]
    assert hf.log_probs[0] > float(full[hf.tokens[0]]) + 0.01


def test_normalised_among_the_top_k(runner):
    config = BASE.replace(top_k=4, top_p=0.0, normalize_log_probs=True, output_log_probs=True)
    out, plain = runner.generate([[5], [5]], [config, config.replace(normalize_log_probs=False)])["outputs"]
    assert out.tokens == plain.tokens
    table = expected(runner, [5], out.tokens)
    total = table.topk(4).values.logsumexp(1)
    want = [x - t for x, t in zip(plain.log_probs, total.tolist(), strict=True)]
    assert out.log_probs == pytest.approx(want, abs=1e-5)
    assert runner.generate([[5]], config.replace(top_k=1))["outputs"][0].log_probs == (0.0,) * 6


def test_scored_rows_do_not_mix():
    x, tokens = torch.randn(3, 20), torch.tensor([[1], [2], [3]])
    samplings = [SamplingConfig(top_k=k, normalize_log_probs=on) for k, on in ((2, True), (9, False), (0, True))]
    together = scored(x, tokens, samplings)
    for i in range(3):
        assert torch.equal(together[i], scored(x[i : i + 1], tokens[i : i + 1], samplings[i : i + 1])[0])
    assert math.isclose(float(together[1]), float(x[1].log_softmax(0)[2]), abs_tol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_logprobs": 2, "return_dict": False}, "'num_logprobs': a tensor of token ids has no place for it"),
    ],
)
def test_refused(runner, fields, words):
    with pytest.raises(ConfigError, match=words):
        runner.generate([[5]], BASE.replace(**fields))


# -- searches ---------------------------------------------------------------------------------------------------------

GATHERED = BuildConfig(max_batch_size=4, max_beam_width=4, max_seq_len=40, gather_generation_logits=True)
BEAMS = SamplingConfig(
    num_beams=3, num_logprobs=4, output_log_probs=True, end_id=(2, 9), min_length=0, max_new_tokens=9, return_dict=True
)
GROUPS = use("diverse_beam_search", groups=2, penalty=2.0)  # which its log-probabilities are told less
SEARCHES = {
    "classic": BEAMS,
    "early": BEAMS.replace(early_stopping=0, length_penalty=0.3, temperature=1.6),
    "widths": BEAMS.replace(num_beams=4, beam_width_array=(2, 4, 3), num_logprobs=2),
    "hf": BEAMS.replace(preset="hf", num_return_sequences=3),
    "drawn": BEAMS.replace(preset="hf", top_k=0, top_p=1.0, temperature=1.3, num_return_sequences=2, random_seed=3),
    "groups": BEAMS.replace(num_beams=4, num_return_sequences=4, decoder=GROUPS, output_log_probs=False),
    "top-k": BEAMS.replace(top_k=5, normalize_log_probs=True),
}


@pytest.fixture(scope="module")
def forking() -> ModelRunner:
    """Logits depend on the whole text, so that a beam with another's would show."""
    engine = MarkovExecutable(31, seed=5, build=GATHERED, remembers=True)
    return ModelRunner.from_engine(engine, plugins=Plugins.load())


def assert_they_are_of_the_path(out, config):
    """Recomputed from the raw logits that were gathered at each of the sequence's tokens."""
    raw = out.generation_logits[:, :31]
    if config.preset == "hf":  # whose processors change log-probabilities
        rows = raw.log_softmax(1) / config.temperature
    else:
        rows = (raw / (config.temperature + 1e-6 if config.temperature != 1 else 1)).log_softmax(1)
    if config.top_k > 1:
        least = rows.topk(config.top_k).values[:, -1:]
        rows = rows.masked_fill(rows < least, -torch.inf).log_softmax(1)
    assert len(out.top_log_probs) == len(out.tokens)
    for row, token, beside in zip(rows, out.tokens, out.top_log_probs, strict=True):
        best = row.topk(config.num_logprobs)
        assert list(beside) == best.indices.tolist()
        assert list(beside.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
        assert beside.get(token, float(row[token])) == pytest.approx(float(row[token]), abs=1e-5)
    if config.output_log_probs:
        chosen = rows[range(len(out.tokens)), list(out.tokens)]
        assert out.log_probs == pytest.approx(chosen.tolist(), abs=1e-5)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_likeliest_beside_each_token_of_a_beam(forking, name):
    """Through forks, in finished sequences and in those that ran until the end; with others in the batch."""
    config = SEARCHES[name]
    alone = BASE.replace(num_logprobs=2)
    result = forking.generate([[5, 3], [7], [11]], [config, alone, BEAMS.replace(num_logprobs=0)])
    searched = [one for one in result["outputs"] if one.request_id == "0"]
    reasons = {one.finish_reason for one in searched}
    assert len(searched) > 1
    for one in searched:
        assert_they_are_of_the_path(one, config)
    assert len({one.tokens for one in searched}) == len(searched), reasons
    (other,) = (one for one in result["outputs"] if one.request_id == "1")
    assert other.top_log_probs == forking.generate([[7]], alone)["outputs"][0].top_log_probs
    assert all(one.top_log_probs == () for one in result["outputs"] if one.request_id == "2")


@pytest.mark.parametrize("name", SEARCHES)
def test_streams_of_beams_revise_theirs(forking, name):
    config, told, revised = SEARCHES[name], {}, 0
    due = {one.sequence: one for one in forking.generate([[5, 3]], config)["outputs"]}
    for delta in forking.generate([[5, 3]], config, streaming=True):
        tokens, beside = told.setdefault(delta.sequence, ([], []))
        assert len(delta.top_log_probs) == len(delta.tokens)
        for kept, new in ((tokens, delta.tokens), (beside, delta.top_log_probs)):
            if delta.keep is not None:
                del kept[delta.keep :]
            kept.extend(new)
        revised += delta.keep is not None
    whole = {number: (tuple(tokens), tuple(beside)) for number, (tokens, beside) in told.items()}
    assert whole == {number: (one.tokens, one.top_log_probs) for number, one in due.items()}
    assert revised, "or it shows little"


def test_streams_of_groups_revise_log_probs_beside_equal_tokens():
    """A group pays for what another took: the same tokens may have other log-probabilities."""
    runner = ModelRunner.from_engine(MarkovExecutable(31, seed=0, build=GATHERED, remembers=True))
    decoder, same = use("diverse_beam_search", groups=2, penalty=0.1), 0
    for prompt in ([5, 3], [1], [20, 4]):
        config = BEAMS.replace(num_beams=4, num_return_sequences=4, decoder=decoder, max_new_tokens=6)
        told: dict[int, tuple[list, list]] = {}
        for delta in runner.generate([prompt], config, streaming=True):
            tokens, log_probs = told.setdefault(delta.sequence, ([], []))
            if delta.keep is not None:
                same += tokens[delta.keep :][:1] == list(delta.tokens[:1])
                del tokens[delta.keep :], log_probs[delta.keep :]
            tokens.extend(delta.tokens)
            log_probs.extend(delta.log_probs)
        for one in runner.generate([prompt], config)["outputs"]:
            assert told[one.sequence] == (list(one.tokens), list(one.log_probs))
    assert same, "or no revision was of log-probabilities alone"


def test_a_contrastive_search_shows_them_too():
    engine = MarkovExecutable(31, build=GATHERED, remembers=True)
    decoder = use("contrastive_search", top_k=3)
    config = SamplingConfig(decoder=decoder, num_logprobs=3, output_log_probs=True, end_id=(), return_dict=True)
    (out,) = ModelRunner.from_engine(engine).generate([[5, 3]], config)["outputs"]
    assert_they_are_of_the_path(out, config)


def test_a_search_without_top_k_has_nothing_to_normalise_among(forking):
    for config in (BEAMS, BEAMS.replace(preset="hf")):
        with pytest.raises(ConfigError, match="nothing in this request's plan honours normalize_log_probs=True"):
            forking.generate([[5]], config.replace(normalize_log_probs=True))


class Wrong(BeamSearch):
    """Tells of another vocabulary."""

    def log_probs(self, logits):
        return logits[:, :-1]


def test_a_search_that_tells_no_log_probs():
    class Package:
        hook_api = "decoder>=1.0,<2"

        @hookimpl
        def trtllm_register_decoders(self, registrar):
            registrar.add("wrong", Wrong, consumes=("num_beams",))

    runner = ModelRunner.from_engine(MarkovExecutable(31, build=GATHERED), plugins=Plugins.load(extra=[Package()]))
    config = BEAMS.replace(decoder="wrong")
    assert runner.generate([[5]], config.replace(num_logprobs=0))["outputs"][0].error is None
    assert "decoder 'wrong' returned" in str(runner.generate([[5]], config)["outputs"][0].error)
