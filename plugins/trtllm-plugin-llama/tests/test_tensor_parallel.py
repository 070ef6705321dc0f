"""Two processes answer as one does."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_core.parallel import run_ranks
from trtllm_core.session import Session, TensorInfo
from trtllm_core.testing.packed import prefill_and_decode, rank_logits
from trtllm_core.testing.reference import LENGTHS

MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),  # kv_heads == ranks
    ("llama", {"num_key_value_heads": 1}),  # one head, held by both
    ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
)


def test_two_ranks(tiny: Any) -> None:
    """All models have 67 tokens: the second rank's share of the vocabulary is padded."""
    models = [tiny(kind, **changes) for kind, changes in MODELS]
    assert all(model.model.config.vocab_size % 2 for model in models)
    prompts, steps = [ids[: n + 4] for ids, n in zip(models[0].prompts, LENGTHS, strict=True)], 4
    engines = [model.engine(tp_size=2) for model in models]
    ranks = run_ranks(rank_logits, 2, engines, prompts, steps, timeout=120, backend="gloo")
    for model, first, second in zip(models, *ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        alone = prefill_and_decode(model.session(), prompts, steps)
        assert model.off(first, alone) < 1e-5
        assert model.off(first, [full[: len(ids)] for full, ids in zip(model.expected, prompts, strict=True)]) < 1e-4


def test_padded_vocabulary(tiny: Any) -> None:
    model = tiny()
    assert model.session().config.vocab_size_padded == 67
    session = Session.from_directory(model.engine(tp_size=2), 1, plugins=model.plugins)
    (out,) = session.infer_shapes([TensorInfo("logits_indices", torch.int64, (3,))])
    assert out == TensorInfo("logits", torch.float32, (3, 68))
