"""How far an exported graph is from the torch backend: the same bytes, run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trtllm_core.backends.linear.executable import LinearExecutable
from trtllm_core.config import EngineConfig
from trtllm_core.engine.weights import Weights
from trtllm_core.plugin import Executable, ModelFamily
from trtllm_core.plugin.kv_policy import KVModel, KVPlan

LENGTHS = (5, 1, 19)
"""Prompts of the ragged batch, cut to what the engine takes."""
STEPS = 4
"""Tokens that are decoded one by one after them."""


def graph_errors(graph: Path, weights: Path, config: EngineConfig, family: ModelFamily) -> dict[str, Any]:
    """Largest difference of logits over a ragged prefill and decoding, and the largest logit. Random prompts.

    Args:
        graph: the ONNX file; float32 or float16, which is what ONNX Runtime computes in on a CPU.
        weights: the safetensors file beside it.
        config: of the engine.
        family: of the model.
    """
    from trtllm_core.backends.onnxruntime.executable import OnnxRuntimeExecutable
    from trtllm_core.backends.torch.backend import TorchBackend

    build, random = config.build, torch.Generator().manual_seed(0)
    lengths = [min(n, build.max_input_len) for n in LENGTHS[: build.max_batch_size]]
    steps = min(STEPS, build.max_seq_len - max(lengths))
    texts = [torch.randint(config.model.vocab_size, (n + steps,), generator=random) for n in lengths]
    exact = TorchBackend().load(weights, config, family, int8_activations=False)
    theirs = packed_logits(exact, texts, lengths)
    tensors = Weights(weights, torch.device("cpu")).tensors
    ours = _linear(OnnxRuntimeExecutable(config, graph, weights=tensors), texts, lengths, steps)
    return {
        "dtype": config.model.dtype,
        "largest_error": (ours - theirs).abs().max().item(),
        "largest_logit": theirs.abs().max().item(),
    }


def _plan(config: EngineConfig, blocks: int, size: int) -> KVPlan:
    model = config.model
    kv = KVModel(
        model.num_layers,
        model.num_kv_heads,
        model.head_size,
        config.kv_dtype,
        model.kv_bytes_per_token(config.kv_dtype),
    )
    return KVPlan(blocks, size, 1, kv)


def packed_logits(engine: Executable, texts: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """float32 ``[rows, steps, vocab]``: logits from each prompt's last token on, in one call for each row."""
    longest = max(len(text) for text in texts)
    engine.allocate_kv(_plan(engine.config, 1, longest))
    rows = []
    for text, length in zip(texts, lengths, strict=True):
        wanted = torch.arange(length - 1, len(text) - 1)
        out = torch.empty(len(wanted), engine.config.vocab_size_padded)
        inputs = {
            "input_ids": text.int(),
            "position_ids": torch.arange(len(text)),
            "query_lengths": torch.tensor([len(text)], dtype=torch.int32),
            "past_lengths": torch.zeros(1, dtype=torch.int32),
            "block_tables": torch.zeros(1, 1, dtype=torch.int32),
            "logits_indices": wanted,
        }
        engine.execute(inputs, {"logits": out}, 0)
        rows.append(out)
    return torch.stack(rows)


def _linear(
    engine: LinearExecutable, texts: Sequence[torch.Tensor], lengths: Sequence[int], steps: int
) -> torch.Tensor:
    """The same as a padded prefill and single steps, over caches that are full of garbage to begin with."""
    count = len(texts)
    engine.allocate_kv(_plan(engine.config, count, engine.config.build.max_seq_len))
    engine.scramble()
    ids = torch.nn.utils.rnn.pad_sequence([text[:n] for text, n in zip(texts, lengths, strict=True)], batch_first=True)
    write, last = torch.zeros(count, dtype=torch.int64), torch.tensor(lengths)[:, None] - 1
    out = []
    for step in range(steps):
        logits = torch.empty(count, 1, engine.config.vocab_size_padded)
        inputs = {"input_ids": ids, "write_indices": write, "logit_indices": last, "cache_rows": torch.arange(count)}
        engine.execute(inputs, {"logits": logits}, 0)
        out.append(logits)
        write = torch.tensor(lengths) + step
        ids = torch.stack([text[n + step] for text, n in zip(texts, lengths, strict=True)])[:, None]
        last = torch.zeros(count, 1, dtype=torch.int64)
    return torch.cat(out, 1)
