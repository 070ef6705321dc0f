"""Text that is cut by strings and regexes, in whole sessions: what streams is the result, and the result is exact."""

from __future__ import annotations

from typing import Any

import pytest
import regex
import torch

from trtllm_core import ModelRunner, SamplingConfig, use
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.vocabulary import byte_tokenizer

PIECES = ["ab", "b\n", "\n\n", "é", "é😀", "ba", " a", "aab", "b é"]
TOKENS = [*(257 + i for i in range(len(PIECES))), *b"ab\n ", *"é😀".encode()]
"""Of a few letters, so that stops occur; single bytes of characters too, in any order."""


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    tokenizer = byte_tokenizer(PIECES)
    table = torch.full((tokenizer.vocab_size,) * 2, -40.0)
    table[:, TOKENS] = torch.randn(tokenizer.vocab_size, len(TOKENS), generator=torch.Generator().manual_seed(3))
    return ModelRunner.from_engine(MarkovExecutable(tokenizer.vocab_size, table=table), tokenizer=tokenizer)


STRINGS, REGEXES = ("é a", "aba", "\n\n\n"), (r"b{2}", r"\w\né", "😀.😀")
CONFIG = SamplingConfig(top_k=0, top_p=1.0, max_new_tokens=60, return_dict=True)
PROMPTS = [[i] for i in range(8)]
CONFIGS = [
    CONFIG.replace(random_seed=seed, stop_strings=STRINGS, stop_regexes=REGEXES if seed % 2 else ())
    for seed in range(8)
]


def cut(data: bytes, regexes: tuple[str, ...]) -> bytes:
    """The text up to the first stop, by a search of every beginning of it."""
    needles = [string.encode() for string in STRINGS]
    for end in range(1, len(data) + 1):
        found = [data.find(needle, 0, end) for needle in needles]
        text, complete = data[:end].decode("utf-8", "surrogateescape"), True
        try:
            data[:end].decode()
        except UnicodeDecodeError as error:
            complete = error.reason != "unexpected end of data"
        if complete:
            matches = [m for pattern in regexes if (m := regex.search(pattern, text))]
            found += [len(text[: m.start()].encode("utf-8", "surrogateescape")) for m in matches]
        if any(begin >= 0 for begin in found):
            return data[: min(begin for begin in found if begin >= 0)]
    return data


def test_streams_and_results_are_cut_where_a_plain_search_cuts(runner: ModelRunner) -> None:
    results = runner.generate(PROMPTS, CONFIGS, text=True)["outputs"]
    streamed = [""] * len(PROMPTS)
    for delta in runner.generate(PROMPTS, CONFIGS, streaming=True, text=True):
        streamed[int(delta.request_id)] += delta.text
    free = runner.generate(PROMPTS, [c.replace(stop_strings=(), stop_regexes=()) for c in CONFIGS])["outputs"]
    detokenise = runner.generation.loop.branches.slots.context.text
    reasons = set()
    for config, output, text, plain in zip(CONFIGS, results, streamed, free, strict=True):
        assert output.text == text == cut(detokenise(plain.tokens), config.stop_regexes).decode("utf-8", "replace")
        assert not any(string in text for string in STRINGS)
        assert output.tokens == plain.tokens[: len(output.tokens)]
        reasons.add(output.finish_reason)
    assert {"stop_string", "stop_regex"} <= reasons


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_strings": STRINGS, "stop_regexes": REGEXES},
        {"stop_words_list": [[PIECES.index("ba") + 257, ord("a")], [ord("b")] * 2]},
        {"end_id": (ord("b"), 260), "min_length": 6},
        {"max_time": 1e6, "max_new_tokens": 11},
        {"stopping_criteria": use("repetition", max_size=3, count=3)},
        {"stopping_criteria": use("confidence", above=0.12, steps=2)},
        {"stopping_criteria": use("confidence", measure="entropy", below=2.3, steps=3)},
    ],
    ids=lambda fields: "-".join(fields),
)
@pytest.mark.parametrize(
    "choosing", [{"top_k": 0, "top_p": 1.0}, {"top_k": 2, "top_p": 0.0}, {"top_k": 1, "top_p": 0.0}]
)
def test_every_criterion_stops_in_drafts_where_it_stops_without(
    runner: ModelRunner, fields: dict[str, Any], choosing: dict[str, Any]
) -> None:
    """N-gram speculation, whose drafts are sometimes right: the same end, to the token and to the byte."""
    wish = CONFIG.replace(**{**choosing, **fields})
    configs = [wish.replace(random_seed=seed) for seed in range(8)]
    plain = runner.generate(PROMPTS, configs, text=True)["outputs"]
    calls = runner.session.engine.calls  # type: ignore[attr-defined]
    drafted = runner.generate(PROMPTS, [c.replace(decoder=use("ngram", tokens=5)) for c in configs], text=True)
    calls = runner.session.engine.calls - calls  # type: ignore[attr-defined]
    for a, b in zip(plain, drafted["outputs"], strict=True):
        assert (b.tokens, b.length, b.text) == (a.tokens, a.length, a.text)
        assert (b.finish_reason, b.matched) == (a.finish_reason, a.matched)
    if choosing["top_k"] == 0 and "max_time" not in fields:
        assert {output.finish_reason for output in plain} != {"length"}, "or nothing is shown"
    assert calls <= max(len(output.tokens) for output in plain) + 1
