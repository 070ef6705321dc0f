"""Whole generations on a model without weights, for the kits' last question: does it work in a session?"""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_core.config import BuildConfig, SamplingConfig
from trtllm_core.outputs import GenerationOutput
from trtllm_core.runner import ModelRunner
from trtllm_core.testing.kit import require
from trtllm_core.testing.lives import Setting
from trtllm_core.testing.markov import MarkovExecutable

Outcome = tuple[tuple[tuple[int, ...], str, str, float], ...]
"""Tokens, finish reason, text and score of each sequence of a request."""


def new_runner(setting: Setting) -> ModelRunner:
    """A new session in debug mode, with the subject's plugins and a tokenizer."""
    build = BuildConfig(max_batch_size=4, max_beam_width=4, max_input_len=63, max_seq_len=96, tokens_per_block=8)
    engine = MarkovExecutable(setting.vocab_size, build=build)
    plugins = setting.subject.plugins
    return ModelRunner.from_engine(engine, debug_mode=True, plugins=plugins, tokenizer=setting.tokenizer)


def generate(setting: Setting, prompts: Sequence[Sequence[int]], requests: Sequence[SamplingConfig]) -> list[Outcome]:
    """Run requests together, twice in one session.

    Raises:
        AssertionError: one of them ended with ``plugin_error``, or the second time is not like the first.
    """
    runner = new_runner(setting)
    rounds = []
    for _ in range(2):
        outputs = runner.generate(prompts, requests, text=True)["outputs"]
        for output in outputs:
            require(output.error is None, f"in a session it fails: {output.error}")
        rounds.append([tuple(map(_outcome, mine)) for mine in sequences(outputs, len(requests))])
    first, second = rounds
    require(first == second, f"a second time in one session, requests get {second}, not {first}")
    return first


def sequences(outputs: Sequence[GenerationOutput], requests: int) -> list[list[GenerationOutput]]:
    """The sequences of each request, best first."""
    found: list[list[GenerationOutput]] = [[] for _ in range(requests)]
    for output in outputs:
        found[int(output.request_id)].append(output)
    return found


def _outcome(output: GenerationOutput) -> tuple[tuple[int, ...], str, str, float]:
    # Scores add up in another order where the batch is another.
    return tuple(output.tokens), output.finish_reason, output.text or "", round(output.score, 3)
