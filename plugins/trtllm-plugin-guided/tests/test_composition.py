"""Guided requests beside everything else that a request may ask for: searches, several answers, stops, preemption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import regex

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig, use
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.vocabulary import synthetic_tokenizer
from trtllm_plugin_guided.processor import Guided

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 500},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CONFIG = SamplingConfig(
    max_new_tokens=150, return_dict=True, random_seed=5, logits_processors=use("guided", json_schema=SCHEMA)
)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    tokenizer = synthetic_tokenizer(500)
    build = BuildConfig(max_batch_size=8, max_beam_width=4, max_input_len=128, max_seq_len=384, tokens_per_block=8)
    return ModelRunner.from_engine(MarkovExecutable(tokenizer.vocab_size, build=build), tokenizer=tokenizer)


def sequences(runner: ModelRunner, config: SamplingConfig, prompt: Sequence[int] = (3,)) -> list[Any]:
    """All sequences that one request gave."""
    outputs = runner.generate([prompt], config, text=True)["outputs"]
    assert [output.error for output in outputs] == [None] * len(outputs)
    return list(outputs)


@pytest.mark.parametrize("fields", [{"num_beams": 4}, {"num_beams": 3, "preset": "hf"}])
def test_every_hypothesis_of_a_search_fits_the_schema(runner: ModelRunner, fields: dict[str, Any]) -> None:
    found = sequences(runner, CONFIG.replace(num_return_sequences=3, repetition_penalty=1.3, **fields))
    assert len({sequence.text for sequence in found}) == 3
    for sequence in found:
        assert sequence.finish_reason == "end_id"
        VALIDATOR.validate(json.loads(sequence.text))


def test_several_answers_fit_the_schema_each_for_itself(runner: ModelRunner) -> None:
    found = sequences(runner, CONFIG.replace(num_return_sequences=4, top_k=0, top_p=1.0))
    assert len({sequence.text for sequence in found}) == 4
    for sequence in found:
        VALIDATOR.validate(json.loads(sequence.text))


@pytest.mark.parametrize("fields", [{"num_beams": 4}, {"num_return_sequences": 4, "top_k": 0, "top_p": 1.0}])
def test_beams_and_answers_with_a_stop_are_cut_there(runner: ModelRunner, fields: dict[str, Any]) -> None:
    """At a string across borders of tokens, at a pattern: what is left begins a text that would have fitted."""
    stops = {"stop_strings": ['", "size'], "stop_regexes": [r"(?<=: )[0-9]{3}"]}
    found = sequences(runner, CONFIG.replace(**fields, **stops))
    reasons = {sequence.finish_reason for sequence in found}
    assert "stop_string" in reasons
    for sequence in found:
        assert sequence.finish_reason in ("stop_string", "stop_regex", "end_id")
        assert '", "size' not in sequence.text
        assert regex.match(r'\{"name": "', sequence.text)
        assert runner.tokenizer is not None
        assert runner.tokenizer.decode(sequence.tokens).startswith(sequence.text)


LIST = {
    "type": "array",
    "items": {"type": "object", "properties": {"kind": {"enum": ["red", "blue"]}}, "required": ["kind"]},
    "minItems": 6,
    "maxItems": 12,
}
BEFORE = '[{"kind": "red"}, {"kind": "red"}, {"kind": "blue"}, {"kind": "blue"}, {"kind": "red"}, '


def stepwise(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, config: SamplingConfig) -> tuple[Any, list[Any]]:
    """The output of a request after ``BEFORE``, and what each step chose and where it stopped."""
    assert runner.tokenizer is not None
    rules, told = runner.generation.loop.branches.rules, []
    conclude = rules.conclude
    with monkeypatch.context() as patch:
        patch.setattr(rules, "conclude", lambda *args: told.append(conclude(*args)) or told[-1])
        (output,) = sequences(runner, config, runner.tokenizer.encode(BEFORE))
    return output, [(tokens, stop) for v in told for tokens, stop in zip(v.tokens, v.stops, strict=True)]


DRAWING = pytest.mark.parametrize("drawing", [{}, {"top_k": 0, "top_p": 1.0, "temperature": 0.7}])
STOPS = [
    {},
    {"stop_regexes": '(?s:"ki.*){3}n'},
    {"stop_strings": '"}, {"ki'},
    {"stop_words_list": [list(b'"}, {')]},
]


@DRAWING
@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("drafts", ["ngram", "forced", "both"])
def test_drafts_with_a_grammar_and_a_stop_in_their_middle(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, drawing: dict[str, Any], stops: dict[str, Any], drafts: str
) -> None:
    """Drafts change nothing but the number of steps: tokens, text, the cut and what matched are the same."""
    wish = CONFIG.replace(logits_processors=use("guided", json_schema=LIST), **drawing, **stops)
    with monkeypatch.context() as patch:
        patch.setattr(Guided, "forced", lambda self, state: ())
        plain, slow = stepwise(runner, monkeypatch, wish)
        assert all(len(tokens) == 1 for tokens, _ in slow)
        if drafts == "ngram":
            drafted, fast = stepwise(runner, monkeypatch, wish.replace(decoder=use("ngram", tokens=12)))
    if drafts != "ngram":
        decoder = use("ngram", tokens=12) if drafts == "both" else None
        drafted, fast = stepwise(runner, monkeypatch, wish.replace(decoder=decoder))
    assert (drafted.tokens, drafted.text, drafted.length) == (plain.tokens, plain.text, plain.length)
    assert (drafted.finish_reason, drafted.matched) == (plain.finish_reason, plain.matched)
    assert len(fast) < len(slow) / 2
    if not stops:
        jsonschema.Draft202012Validator(LIST).validate(json.loads(plain.text))
        return
    assert plain.finish_reason in ("stop_regex", "stop_string", "stop_words")
    tokens, stop = fast[-1]
    assert 0 < stop.at < len(tokens) - 1, "the stop is in the middle of what the step accepted"


def test_a_draft_that_the_grammar_forbids_is_not_accepted(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt repeats what the schema has no place for."""
    monkeypatch.setattr(Guided, "forced", lambda self, state: ())
    schema = {"type": "array", "items": {"enum": ["red"]}, "minItems": 3, "maxItems": 3}
    wish = CONFIG.replace(logits_processors=use("guided", json_schema=schema))
    assert runner.tokenizer is not None
    prompt = runner.tokenizer.encode('["red", "blue", "blue", ["red", "red", "blue"], ["red')
    plain, drafted = (
        sequences(runner, each, prompt)[0] for each in (wish, wish.replace(decoder=use("ngram", tokens=12)))
    )
    assert drafted.tokens == plain.tokens
    assert drafted.text == '["red", "red", "red"]'
