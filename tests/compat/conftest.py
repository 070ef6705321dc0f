"""A Markov engine, and its greedy choices made by hand; and a tiny engine on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, build_engine
from trtllm_core.testing.checkpoints import write_byte_tokenizer, write_llama
from trtllm_core.testing.markov import MarkovExecutable


@pytest.fixture
def runner() -> ModelRunner:
    return ModelRunner.from_engine(MarkovExecutable())


@pytest.fixture
def cramped() -> ModelRunner:
    """Four requests, but the steps have room for two prompts: rows are at different steps."""
    build = BuildConfig(max_batch_size=4, max_num_tokens=4, max_input_len=63, max_seq_len=64, tokens_per_block=8)
    return ModelRunner.from_engine(MarkovExecutable(build=build))


Process = Callable[[list[int], torch.Tensor], torch.Tensor]


@pytest.fixture
def by_hand() -> Callable[..., list[int]]:
    """``by_hand(runner, prompt, process, n)``: the n greedy tokens where ``process(tokens, logits)`` makes logits."""

    def generate(runner: ModelRunner, prompt: Sequence[int], process: Process, n: int = 12) -> list[int]:
        tokens = list(prompt)
        for _ in range(n):
            logits = process(list(tokens), runner.generation.session.engine.table[tokens[-1]].clone())
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    return generate


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny LLaMA, ``checkpoint``, whose tokens are bytes, and its engine, ``engine``."""
    directory = tmp_path_factory.mktemp("compat")
    checkpoint = write_llama(directory / "checkpoint", vocab_size=256)
    write_byte_tokenizer(checkpoint)
    build = BuildConfig(max_batch_size=4, max_seq_len=128, max_input_len=96, tokens_per_block=16)
    build_engine(str(checkpoint), directory / "engine", build)
    return directory
