"""The batch-invariant mode on every architecture: the same bits in any company, whole or in pieces."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from trtllm_core.plugin import Plugins
from trtllm_core.testing.packed import PackedRows
from trtllm_core.testing.reference import ReferenceModel

GPT = {"vocab_size": 131, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 96, "n_inner": 101}
OTHER = {
    "vocab_size": 131,
    "hidden_size": 36,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 96,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "gptj": lambda: transformers.GPTJConfig(**GPT, rotary_dim=6),
    "neox": lambda: transformers.GPTNeoXConfig(**OTHER, rotary_pct=0.5),
    "bloom": lambda: transformers.BloomConfig(vocab_size=131, hidden_size=36, n_head=3, n_layer=2, seq_length=96),
    "qwen3": lambda: transformers.Qwen3Config(**OTHER, num_key_value_heads=1, head_dim=12),
    "phi3": lambda: transformers.Phi3Config(**OTHER, num_key_value_heads=3, sliding_window=20, pad_token_id=0),
}
LENGTHS = (1, 2, 17, 64, 65, 90)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_bits(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Widths leave elements over after whole vectors."""
    model = ReferenceModel(CONFIGS[kind](), tmp_path_factory.mktemp(kind), Plugins.load())
    session = model.session(batch_invariant=True)
    rng = random.Random(3)
    prompts = [[rng.randrange(131) for _ in range(n)] for n in LENGTHS]
    alone = [PackedRows(session, 1, shuffle=None).run({0: ids})[0] for ids in prompts]
    rows = PackedRows(session, 6, shuffle=1)
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    for sizes in ((1, 1, 5, 40, 33, 1), (0, 1, 1, 1, 32, 60), (0, 0, 11, 23, 0, 1), (0, 0, 0, 0, 0, 28)):
        chunks = {i: prompts[i][(at := int(rows.lengths[i])) : at + n] for i, n in enumerate(sizes) if n}
        for row, logits in rows.run(dict(reversed(chunks.items()))).items():
            parts[row].append(logits)
    assert rows.lengths.tolist() == list(LENGTHS)
    assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(parts, alone, strict=True))
    assert model.off([torch.cat(part) for part in parts], [fast(model, ids) for ids in prompts]) < 1e-4


@torch.inference_mode()
def fast(model: ReferenceModel, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model.model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits
