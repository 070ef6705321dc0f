"""Processors and criteria of transformers run as ours, each branch as if it were alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers.generation import logits_process as theirs
from transformers.generation import stopping_criteria as criteria

from trtllm_core import ModelRunner, SamplingConfig, build_engine
from trtllm_core.compat import TransformersLogitsProcessor, TransformersStoppingCriterion
from trtllm_core.compat.hf import STATELESS
from trtllm_core.errors import ConfigError, PluginRuntimeError
from trtllm_core.testing.checkpoints import write_llama

PROMPTS = [[5, 6], [11], [42, 17, 3], [5, 6]]
CONFIG = SamplingConfig(max_new_tokens=12, end_id=(), return_dict=True)
PROCESSORS = {
    "repetition": lambda: theirs.RepetitionPenaltyLogitsProcessor(3.0),
    "ngram": lambda: theirs.NoRepeatNGramLogitsProcessor(2),
    "bias": lambda: theirs.SequenceBiasLogitsProcessor({(3,): 6.0, (7, 9): 8.0}),
    "bad words": lambda: theirs.NoBadWordsLogitsProcessor([[31], [95, 56]]),
    "prefix": lambda: theirs.PrefixConstrainedLogitsProcessor(lambda _, ids: [int(ids[-1]) % 90 + 1, 2], 1),
    "suppress": lambda: theirs.SuppressTokensLogitsProcessor(list(range(40, 80))),
    "typical": lambda: theirs.TypicalLogitsWarper(0.6),
    "eta": lambda: theirs.EtaLogitsWarper(0.1),
    "watermark": lambda: theirs.WatermarkLogitsProcessor(97, "cpu", bias=6.0, hashing_key=3),
    "synthid": lambda: theirs.SynthIDTextWatermarkLogitsProcessor(3, [5, 9, 11], 1024, 0, 64, "cpu"),
    "list": lambda: theirs.LogitsProcessorList(
        [theirs.TemperatureLogitsWarper(0.5), theirs.NoRepeatNGramLogitsProcessor(1)]
    ),
}


def alone(make):
    """What transformers computes for one sequence, with an object of its own."""
    processor = make()
    return lambda tokens, logits: processor(torch.tensor([tokens]), logits[None])[0]


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_branch_gets_what_transformers_computes_for_it_alone(runner, by_hand, name):
    make = PROCESSORS[name]
    result = runner.generate(PROMPTS, CONFIG, logits_processor=TransformersLogitsProcessor(make()))
    expected = [by_hand(runner, prompt, alone(make)) for prompt in PROMPTS]
    assert [list(output.tokens) for output in result["outputs"]] == expected
    plain = [by_hand(runner, prompt, lambda _, logits: logits) for prompt in PROMPTS]
    assert name in ("typical", "eta") or expected != plain, "or the test would show nothing"


class Counts(transformers.LogitsProcessor):
    """Bans as many tokens as it was called before: wrong as soon as two sequences share it."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.masked_fill(torch.arange(scores.shape[1]) < self.calls * 4, -float("inf"))


def test_what_may_keep_a_state_is_copied_for_each_branch(runner, by_hand):
    counts = Counts()
    result = runner.generate(PROMPTS, CONFIG, logits_processor=TransformersLogitsProcessor([counts]))
    assert [list(o.tokens) for o in result["outputs"]] == [by_hand(runner, p, alone(Counts)) for p in PROMPTS]
    assert counts.calls == 0


def test_the_stateless_are_theirs_and_have_not_gone():
    known = {name for module in (theirs, criteria) for name in vars(module)}
    assert known >= STATELESS
    for name in STATELESS - {"MinNewTokensLengthLogitsProcessor"}:
        assert "Whisper" not in name
        assert "Watermark" not in name


class TopKLogitsWarper(Counts):
    """Somebody else's, with a name of theirs."""


@pytest.mark.parametrize(
    ("thing", "speculation"),
    [
        (theirs.TopKLogitsWarper(3), "per_position"),
        ([theirs.TopKLogitsWarper(3), Counts()], "none"),
        (TopKLogitsWarper(), "none"),
        (theirs.WatermarkLogitsProcessor(97, "cpu"), "none"),
    ],
)
def test_only_what_is_known_to_keep_no_state_takes_part_in_speculation(thing, speculation):
    assert TransformersLogitsProcessor(thing).capabilities.speculation == speculation
    assert TransformersLogitsProcessor(thing, stateless=True).capabilities.speculation == "per_position"
    state = TransformersLogitsProcessor(thing, stateless=True)
    assert state.take_back(state.start(None), 2) == state.start(None)


def test_what_cannot_work_is_refused():
    class Guided:
        model = None

        def __call__(self, input_ids, scores):
            return scores

    guided = Guided()
    guided.model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Guided runs a model of its own"):
        TransformersLogitsProcessor(guided)
    with pytest.raises(ConfigError, match="cannot be called"):
        TransformersLogitsProcessor([3])
    with pytest.raises(ConfigError, match="needs the scores of all steps"):
        TransformersStoppingCriterion(criteria.ConfidenceCriteria(0.5))


def test_an_error_ends_the_request_with_its_cause(runner):
    class Broken:
        def __call__(self, input_ids, scores):
            raise KeyError("why")

    (output,) = runner.generate([[5]], CONFIG, logits_processor=TransformersLogitsProcessor(Broken()))["outputs"]
    assert (output.finish_reason, type(output.error)) == ("plugin_error", PluginRuntimeError)
    assert "why" in str(output.error)

    class Short(Broken):
        def __call__(self, input_ids, scores):
            return scores[:, :3]

    (output,) = runner.generate([[5]], CONFIG, logits_processor=TransformersLogitsProcessor(Short()))["outputs"]
    assert "Short returned no scores" in str(output.error)


def test_criteria(runner, by_hand):
    plain = [by_hand(runner, prompt, lambda _, logits: logits) for prompt in PROMPTS]
    ends = [tokens[3] for tokens in plain]
    both = criteria.StoppingCriteriaList([criteria.EosTokenCriteria(ends), criteria.MaxLengthCriteria(5)])
    outputs = runner.generate(PROMPTS, CONFIG, stopping_criteria=TransformersStoppingCriterion(both))["outputs"]
    for prompt, tokens, output in zip(PROMPTS, plain, outputs, strict=True):
        whole = torch.tensor([[*prompt, *tokens]])
        n = next(n for n in range(1, 13) if bool(both(whole[:, : len(prompt) + n], None)))
        assert output.tokens == tuple(tokens[:n])
        assert output.finish_reason == "stopping_criteria"
        assert output.matched in ("MaxLengthCriteria", "EosTokenCriteria")
    assert {output.matched for output in outputs} == {"MaxLengthCriteria", "EosTokenCriteria"}


class ThirdCall(criteria.StoppingCriteria):
    """Older criteria answer with a plain bool."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return self.calls == 3


def test_a_criterion_with_a_state_is_copied_for_each_branch(runner):
    outputs = runner.generate(PROMPTS, CONFIG, stopping_criteria=TransformersStoppingCriterion(ThirdCall()))["outputs"]
    assert [len(output.tokens) for output in outputs] == [3, 3, 3, 3]
    criterion = TransformersStoppingCriterion(ThirdCall())
    state = criterion.start(None)
    criterion.check(state, [1], [2])
    copied = criterion.copy(state)
    criterion.check(copied, [1, 2], [3])
    assert (state[0].calls, copied[0].calls) == (1, 2)
    with pytest.raises(NotImplementedError, match="cannot rewind"):
        criterion.take_back(state, 1)
    assert copy.deepcopy(criterion) is not None


def test_a_whole_generation_equals_that_of_transformers(tmp_path):
    """The same checkpoint, the same list of processors, in both: token for token."""
    checkpoint = write_llama(tmp_path / "llama")
    build_engine(str(checkpoint), tmp_path / "engine")
    runner = ModelRunner.from_dir(tmp_path / "engine")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = [5, 9, 13, 9]
    make = lambda: theirs.LogitsProcessorList(  # noqa: E731
        [theirs.RepetitionPenaltyLogitsProcessor(1.7), theirs.NoRepeatNGramLogitsProcessor(2), Counts()]
    )
    whole = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=make(),
    )
    ours = runner.generate(
        [prompt], CONFIG.replace(max_new_tokens=10), logits_processor=TransformersLogitsProcessor(make())
    )
    assert list(ours["outputs"][0].tokens) == whole[0, len(prompt) :].tolist()


def test_what_keeps_no_state_takes_part_in_speculation(runner, by_hand):
    """The n-gram decoder's drafts are verified behind it, and the tokens are those of greedy decoding."""
    config = CONFIG.replace(decoder="ngram", max_new_tokens=30)
    processor = TransformersLogitsProcessor(theirs.RepetitionPenaltyLogitsProcessor(1.1))
    limit = TransformersStoppingCriterion(criteria.MaxLengthCriteria(25))
    calls = runner.session.engine.calls
    outputs = runner.generate([[5, 6]], config, logits_processor=processor, stopping_criteria=limit)["outputs"]
    make = lambda: theirs.RepetitionPenaltyLogitsProcessor(1.1)  # noqa: E731
    assert list(outputs[0].tokens) == by_hand(runner, [5, 6], alone(make), 23)
    assert outputs[0].finish_reason == "stopping_criteria"
    assert runner.session.engine.calls - calls <= 23
