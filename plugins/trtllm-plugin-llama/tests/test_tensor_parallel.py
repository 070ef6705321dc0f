"""Two processes answer as one does."""

from __future__ import annotations

from itertools import count, repeat
from pathlib import Path
from typing import Any

import torch

from trtllm_core import GenerationSession, Mapping, SamplingConfig
from trtllm_core.parallel import TensorParallel, run_ranks
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


def answers(
    parallel: TensorParallel, engines: list[Path], prompts: list[list[int]], steps: int
) -> tuple[list[list[torch.Tensor]], tuple[str, int]]:
    """What a rank answers, and how its request ends that may take 3 s, by a clock of 1 s a reading, or of none."""
    logits = rank_logits(parallel, engines, prompts, steps)
    ticks = count() if parallel.rank == 0 else repeat(0)
    mapping = Mapping(world_size=2, rank=parallel.rank, tp_size=2)
    session = Session.from_directory(engines[0], parallel.rank, parallel=parallel)
    with GenerationSession(None, session, mapping, clock=lambda: float(next(ticks))) as generation:
        config = SamplingConfig(max_new_tokens=8, max_time=3.0, end_id=(), return_dict=True)
        (output,) = generation.decode_batch(prompts[:1], config)["outputs"]
    return logits, (output.finish_reason, len(output.tokens))


def test_two_ranks(tiny: Any) -> None:
    """All models have 67 tokens: the second rank's share of the vocabulary is padded."""
    models = [tiny(kind, **changes) for kind, changes in MODELS]
    assert all(model.model.config.vocab_size % 2 for model in models)
    prompts, steps = [ids[: n + 4] for ids, n in zip(models[0].prompts, LENGTHS, strict=True)], 4
    engines = [model.engine(tp_size=2) for model in models]
    ranks = run_ranks(answers, 2, engines, prompts, steps, timeout=120, backend="gloo")
    assert ranks[0][1] == ranks[1][1] == ("timed_out", 3), "rank 0's clock counts on both"
    for model, first, second in zip(models, *(logits for logits, _ in ranks), strict=True):
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
