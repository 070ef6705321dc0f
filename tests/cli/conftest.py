"""A tiny random LLaMA with a byte-level tokenizer, and an engine of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trtllm_core.cli.app import app

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Invoke = Callable[..., Any]


def write_checkpoint(path: Path, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """Random weights: two layers of 64, and a vocabulary of the 256 bytes (the first few serve as special tokens)."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=254,
        eos_token_id=255,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    # Two bytes that never occur in UTF-8 give their places to the special tokens.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:254]
    vocab = {character: number for number, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={**vocab, "<s>": 254, "</s>": 255}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(path)
    return path


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes further checkpoints: ``make_checkpoint("name", seed=1)``."""
    return lambda name, **options: write_checkpoint(tmp_path / name, **options)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory. Tests must not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path) -> Path:
    """An engine of it, for 4 sequences of 128 tokens. Tests must not change it."""
    engine = tiny_checkpoint.parent / "engine"
    options = ["--max-batch-size", "4", "--max-seq-len", "128", "--max-input-len", "96", "--tokens-per-block", "16"]
    result = CliRunner().invoke(app, ["build", str(tiny_checkpoint), "-o", str(engine), *options])
    assert result.exit_code == 0, result.output
    return engine


@pytest.fixture
def cli() -> Invoke:
    """Runs a command in this process. Standard input is empty and no terminal."""

    def invoke(*arguments: object, status: int = 0, input: str | bytes | None = None) -> Any:  # noqa: A002
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return invoke


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a process of its own."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trtllm_core.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, input=stdin, check=False, timeout=120)

    return run
