"""What a request may ask for, and what is refused before its first token."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_core import ModelRunner, SamplingConfig, use
from trtllm_core.errors import ConfigError
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.vocabulary import byte_tokenizer


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    tokenizer = byte_tokenizer()
    return ModelRunner.from_engine(MarkovExecutable(tokenizer.vocab_size), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "give one of json_schema, json_object, regex, grammar, not none"),
        ({"regex": "a", "grammar": "start: /b/"}, "not regex and grammar"),
        ({"json_object": True, "json_schema": {}}, "not json_schema and json_object"),
        ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema: Unimplemented keys: .*uniqueItems"),
        ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable schema"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, "does not exist"),
        ({"json_schema": False}, "accepts nothing"),
        ({"json_schema": "{"}, "json_schema: it is no JSON"),
        ({"json_schema": "[]"}, "a schema is an object"),
        ({"regex": "(a"}, "regex: unclosed group"),
        ({"regex": "(?=a)b"}, "regex: look-around"),
        ({"grammar": "start: other"}, 'grammar: .* unknown name: "other"'),
        ({"grammar": "start: /(/"}, "grammar: unclosed group"),
        ({"grammar": 'root ::= ("a"'}, "grammar: Expected"),
        ({"grammar": ""}, "grammar: "),
        ({"regex": "a", "whitespace": True}, "whitespace is for JSON, not for a regex"),
        ({"schema": {}}, "no parameter 'schema'"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_sentence(
    runner: ModelRunner, params: dict[str, Any], words: str
) -> None:
    sound = SamplingConfig(max_new_tokens=4)
    with pytest.raises(ConfigError, match=words) as caught:
        runner.generate([[1], [2]], [sound, sound.replace(logits_processors=use("guided", **params))])
    assert "guided" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert runner.session.engine.calls == 0  # type: ignore[attr-defined]


def test_a_request_that_nothing_ends_is_refused(runner: ModelRunner) -> None:
    config = SamplingConfig(end_id=(), logits_processors=use("guided", regex="a"))
    with pytest.raises(ConfigError, match="needs a token that ends the text"):
        runner.generate([[1]], config)


def test_an_engine_without_a_tokenizer_is_refused() -> None:
    bare = ModelRunner.from_engine(MarkovExecutable())
    with pytest.raises(ConfigError, match="'guided' needs 'text'"):
        bare.generate([[1]], SamplingConfig(end_id=3, logits_processors=use("guided", regex="a")))


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"json_schema": {"const": {"a": [1, None]}}}, '{"a": [1, null]}'),
        ({"json_schema": '{"enum": ["x"]}'}, '"x"'),
        ({"regex": "(ab){3}é"}, "abababé"),
        ({"grammar": 'start: "x" tail\ntail: "y" "z"?\n"z": '}, None),
        ({"grammar": 'start: "x" tail\ntail: "yz"'}, "xyz"),
        ({"grammar": 'root ::= "x" tail\ntail ::= "y" [z]'}, "xyz"),
    ],
)
def test_what_is_written_where_there_is_one_way(runner: ModelRunner, params: dict[str, Any], text: str | None) -> None:
    config = SamplingConfig(max_new_tokens=40, return_dict=True, logits_processors=use("guided", **params))
    if text is None:
        with pytest.raises(ConfigError, match="grammar"):
            runner.generate([[1]], config)
        return
    output = runner.generate([[1]], config, text=True)["outputs"][0]
    assert (output.finish_reason, output.text) == ("end_id", text)
