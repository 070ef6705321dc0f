"""Whole generations on a model without weights, for the kits' last question: does it work in a session?"""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_core.config import BuildConfig, SamplingConfig
from trtllm_core.runner import ModelRunner
from trtllm_core.testing.kit import require
from trtllm_core.testing.letters import letter_tokenizer
from trtllm_core.testing.markov import MarkovExecutable
from trtllm_core.testing.subject import Subject

Outcome = tuple[tuple[int, ...], str, str]
"""Tokens, finish reason and text."""


def new_runner(subject: Subject, vocab_size: int) -> ModelRunner:
    """A new session in debug mode, with the subject's plugins and a tokenizer."""
    build = BuildConfig(max_batch_size=8, max_input_len=63, max_seq_len=96, tokens_per_block=8)
    engine = MarkovExecutable(vocab_size, build=build)
    tokenizer = letter_tokenizer(vocab_size)
    return ModelRunner.from_engine(engine, debug_mode=True, plugins=subject.plugins, tokenizer=tokenizer)


def generate(
    subject: Subject, vocab_size: int, prompts: Sequence[Sequence[int]], requests: Sequence[SamplingConfig]
) -> list[Outcome]:
    """Run requests together in a new session.

    Raises:
        AssertionError: one of them ended with ``plugin_error``.
    """
    outputs = new_runner(subject, vocab_size).generate(prompts, requests, text=True)["outputs"]
    for output in outputs:
        require(output.error is None, f"in a session it fails: {output.error}")
    return [(tuple(output.tokens), output.finish_reason, output.text or "") for output in outputs]
