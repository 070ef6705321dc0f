"""Texts written by a model of random logits are what was asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import regex

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig, use
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.vocabulary import synthetic_tokenizer

from .schemas import Schema, instance, random_schema

ROOM = 6000
"""Tokens of the longest text: the schemas are bounded, and so is this."""


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """A model that likes bytes as much as pieces of words, in a vocabulary of 600."""
    tokenizer = synthetic_tokenizer(600)
    build = BuildConfig(max_batch_size=32, max_input_len=64, max_seq_len=ROOM + 64, tokens_per_block=64)
    return ModelRunner.from_engine(MarkovExecutable(tokenizer.vocab_size, build=build), tokenizer=tokenizer)


CONFIG = SamplingConfig(top_k=0, top_p=1.0, max_new_tokens=ROOM, return_dict=True)


def texts(runner: ModelRunner, asked: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """What is written for each: all of it must have come to its end."""
    found: list[str] = []
    for begin in range(0, len(asked), 32):
        part = asked[begin : begin + 32]
        configs = [
            CONFIG.replace(logits_processors=use("guided", **params), random_seed=seed + begin + i)
            for i, params in enumerate(part)
        ]
        outputs = runner.generate([[i + 1] for i in range(len(part))], configs, text=True)["outputs"]
        assert {output.finish_reason for output in outputs} == {"end_id"}, [output.error for output in outputs]
        found += [output.text for output in outputs]
    return found


def assert_all_validate(runner: ModelRunner, count: int, seed: int) -> None:
    draw = random.Random(seed)
    schemas: list[Schema] = [random_schema(draw) for _ in range(count)]
    for schema, text in zip(schemas, texts(runner, [{"json_schema": s} for s in schemas], seed), strict=True):
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_generated_schemas(runner: ModelRunner) -> None:
    assert_all_validate(runner, 48, seed=1)


@pytest.mark.slow
def test_500_generated_schemas(runner: ModelRunner) -> None:
    assert_all_validate(runner, 500, seed=2)


def test_the_schemas_are_not_trivial() -> None:
    """What the tests above would accept of anything, or refuse, is seen here."""
    draw = random.Random(3)
    for _ in range(50):
        schema = random_schema(draw)
        validator = jsonschema.Draft202012Validator(schema)
        validator.check_schema(schema)
        assert validator.is_valid(instance(schema, draw))
        assert not validator.is_valid([])


@pytest.mark.parametrize(
    "pattern",
    [r"[a-z]{3}-[0-9]{2,4}(x|yz)", r"(\+49|0)[1-9][0-9]{5}", r"[ぁ-ん]{2,6}", r"(a(b|cd){1,9}e){2}", r"😀{1,3}ü?"],
)
def test_regexes(runner: ModelRunner, pattern: str) -> None:
    for text in texts(runner, [{"regex": pattern}] * 16, seed=5):
        assert regex.fullmatch(pattern, text), text


ARITHMETIC = """
start: sum
sum: product ("+" product){0,2}
product: atom ("*" atom){0,2}
atom: NUMBER | "(" NUMBER "-" NUMBER ")"
NUMBER: /[1-9][0-9]{0,3}/
"""


def test_grammars(runner: ModelRunner) -> None:
    found = texts(runner, [{"grammar": ARITHMETIC}] * 32, seed=7)
    assert len(set(found)) > 20
    for text in found:
        assert regex.fullmatch(r"[0-9+*()-]+", text)
        assert isinstance(eval(text), int)  # the grammar is one of Python's expressions


def test_whitespace_where_it_is_allowed(runner: ModelRunner) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}
    found = texts(runner, [{"json_schema": schema, "whitespace": True}] * 16, seed=9)
    assert all(json.loads(text) in ([1, 1], [1, 2], [2, 1], [2, 2]) or len(json.loads(text)) == 3 for text in found)
    assert any(regex.search(r"\s", text.replace(", ", ",")) for text in found)


def test_a_guided_request_and_plain_ones_in_one_batch(runner: ModelRunner) -> None:
    plain = CONFIG.replace(max_new_tokens=20, end_id=(), random_seed=3)
    alone = runner.generate([[5]], plain)["outputs"][0]
    guided = CONFIG.replace(logits_processors=use("guided", json_object=True), max_new_tokens=20, random_seed=3)
    outputs = runner.generate([[5], [5], [5]], [plain, guided, plain], text=True)["outputs"]
    assert outputs[0].tokens == outputs[2].tokens == alone.tokens
    assert outputs[1].text.startswith("{")
