"""SmolLM2-135M-Instruct, eight questions to it, and what transformers answers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_core import Plugins
from trtllm_core.checkpoint import Tokenizer, open_checkpoint

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "def fibonacci(n):",
    "Explain gravity to a child in two sentences.",
    "List five colours.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "1 + 1 =",
)


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return Plugins.load()


@pytest.fixture(scope="session")
def prompts(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    directory = tmp_path_factory.mktemp("tokenizer")
    files = open_checkpoint(smollm2_gguf).tokenizer()
    assert files is not None
    files.write(directory)
    tokenizer = Tokenizer.from_dir(directory)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [tokenizer.encode(text, add_special=False) for text in texts]


@pytest.fixture(scope="session")
def peer(smollm2_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()


@pytest.fixture(scope="session")
def expected(peer: Any, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """What transformers generates for each prompt alone."""
    out = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            made = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            out.append(tuple(made[0, len(prompt) :].tolist()))
    return out
