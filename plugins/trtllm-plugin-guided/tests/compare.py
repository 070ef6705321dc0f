"""llguidance beside xgrammar: what grammars cost on one thread, with a made-up vocabulary and random JSON schemas.

Run it as ``python plugins/trtllm-plugin-guided/tests/compare.py``. A library that is not installed is left out.
Times are CPU times of the thread, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from schemas import Schema, instance, random_schema

from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.testing.vocabulary import synthetic_tokenizer
from trtllm_plugin_guided.vocabulary import Vocabulary

STEPS = 60
"""Longest random walk."""


class Library(ABC):
    """One library, with one grammar at a time."""

    name: str

    def __init__(self, vocabulary: Vocabulary, end: int) -> None:
        self.end = end
        self.words = np.zeros(vocabulary.words, np.int32)

    @abstractmethod
    def compile(self, schema: Schema) -> None:
        """Begin a text."""

    @abstractmethod
    def mask(self) -> None:
        """Fill ``words``."""

    @abstractmethod
    def take(self, token: int) -> bool:
        """Go on with a token."""

    @abstractmethod
    def rollback(self, n: int) -> None:
        """Take tokens back."""

    @abstractmethod
    def copy(self) -> None:
        """Make a copy, as for a fork."""

    @abstractmethod
    def forced(self) -> None:
        """What must come next."""


class Llguidance(Library):
    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary, end: int) -> None:
        from llguidance import LLMatcher

        super().__init__(vocabulary, vocabulary.end)
        self.kind, self.tokenizer = LLMatcher, vocabulary.tokenizer

    def compile(self, schema: Schema) -> None:
        layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        grammar = self.kind.grammar_from_json_schema(json.dumps(schema), overrides=layout)
        self.matcher = self.kind(self.tokenizer, grammar)
        assert not self.matcher.is_error(), self.matcher.get_error()

    def mask(self) -> None:
        self.matcher.unsafe_compute_mask_ptr(self.words.ctypes.data, self.words.nbytes)

    def take(self, token: int) -> bool:
        return bool(self.matcher.try_consume_tokens([token]))

    def rollback(self, n: int) -> None:
        self.matcher.rollback(n)

    def copy(self) -> None:
        self.matcher.deep_copy()

    def forced(self) -> None:
        self.matcher.compute_ff_tokens()


class Xgrammar(Library):
    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary, end: int) -> None:
        import torch
        import xgrammar

        super().__init__(vocabulary, end)
        torch.set_num_threads(1)
        info = xgrammar.TokenizerInfo(
            list(vocabulary.pieces),
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=vocabulary.end,
            stop_token_ids=[end],
            add_prefix_space=False,
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.kind = xgrammar.GrammarMatcher
        self.bitmask = torch.from_numpy(self.words[: -(-vocabulary.end // 32)]).unsqueeze(0)

    def compile(self, schema: Schema) -> None:
        compiled = self.compiler.compile_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
        self.matcher = self.kind(compiled)

    def mask(self) -> None:
        self.bitmask.fill_(-1)
        self.matcher.fill_next_token_bitmask(self.bitmask, 0)

    def take(self, token: int) -> bool:
        return bool(self.matcher.accept_token(token))

    def rollback(self, n: int) -> None:
        self.matcher.rollback(n)

    def copy(self) -> None:
        self.matcher.fork()

    def forced(self) -> None:
        self.matcher.find_jump_forward_string()


class Stopwatch:
    """CPU times by what was done."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def __call__(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.thread_time()
        result = call(*args)
        self.times.setdefault(what, []).append(time.thread_time() - start)
        return result


def measure(library: Library, schemas: Sequence[Schema], texts: Sequence[Sequence[int]]) -> Stopwatch:
    """Each schema: compiled, followed along a text that fits it, and along tokens drawn from its masks."""
    watch, draw = Stopwatch(), np.random.default_rng(0)
    for schema, tokens in zip(schemas, texts, strict=True):
        watch("compile a schema", library.compile, schema)
        watch("what must come next", library.forced)
        for token in tokens:
            watch("mask, along an instance", library.mask)
            assert watch("take a token", library.take, token)
        watch("give 3 tokens back", library.rollback, min(3, len(tokens)))
        watch("copy", library.copy)
        library.compile(schema)
        for _ in range(STEPS):
            watch("mask, along a random walk", library.mask)
            allowed = np.nonzero(np.unpackbits(library.words.view(np.uint8), bitorder="little"))[0]
            allowed = allowed[allowed != library.end]
            if not len(allowed) or not library.take(int(draw.choice(allowed))):
                break
    return watch


def main() -> None:
    """Print a table for each library that is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, default=128000)
    parser.add_argument("--schemas", type=int, default=200)
    asked = parser.parse_args()
    pieces = TokenBytes.of(synthetic_tokenizer(asked.vocab)).pieces
    vocabulary = Vocabulary(pieces, None)  # no tokenizer's own way: the longest token first, for both libraries
    draw = random.Random(0)
    schemas = [random_schema(draw) for _ in range(asked.schemas)]
    texts = [vocabulary.tokens(json.dumps(instance(schema, draw), ensure_ascii=False)) for schema in schemas]
    print(f"{asked.vocab} tokens, {asked.schemas} schemas, one thread, µs of CPU time")
    for kind in (Llguidance, Xgrammar):
        try:
            found = importlib.metadata.distribution(kind.name)
        except importlib.metadata.PackageNotFoundError:
            print(f"\n{kind.name}: not installed")
            continue
        needs = [line.split(";")[0].strip() for line in found.requires or [] if "extra" not in line]
        print(f"\n{kind.name} {found.version}, needs {', '.join(needs) or 'nothing'}")
        watch = Stopwatch()
        library = watch("set up a vocabulary", kind, vocabulary, 256)
        watch.times |= measure(library, schemas, texts).times
        print(f"{'':28}{'mean':>10}{'median':>10}{'99 of 100':>12}")
        for what, times in watch.times.items():
            ordered = sorted(1e6 * seconds for seconds in times)
            late = ordered[int(0.99 * (len(ordered) - 1))]
            print(f"{what:28}{statistics.fmean(ordered):>10.1f}{statistics.median(ordered):>10.1f}{late:>12.1f}")


if __name__ == "__main__":
    main()
