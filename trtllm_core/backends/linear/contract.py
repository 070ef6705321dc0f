"""The tensors of the padded, linear contract."""

from __future__ import annotations

from trtllm_core.config import EngineConfig
from trtllm_core.plugin import TensorSpec


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the layers' caches, in the order in which the graph has them: ``past_key_0``, ``past_value_0``, …"""
    return [f"{prefix}_{what}_{layer}" for layer in range(layers) for what in ("key", "value")]


def tensor_specs(config: EngineConfig) -> tuple[TensorSpec, ...]:
    """What a step gives and takes. The caches are the executable's own: see ``Executable.allocate_kv``.

    ``cache_rows`` says which rows of the caches the batch is, one after another: a slot is a row.
    """
    build = config.build
    rows, tokens = build.max_branches, build.max_seq_len
    return (
        TensorSpec("input_ids", "int64", ("batch", "tokens"), True, (1, 1), (rows, tokens)),
        TensorSpec("write_indices", "int64", ("batch",), True, (1,), (rows,)),
        TensorSpec("logit_indices", "int64", ("batch", "asked"), True, (1, 1), (rows, tokens)),
        TensorSpec("cache_rows", "int64", ("batch",), True, (1,), (rows,)),
        TensorSpec("logits", "float32", ("batch", "asked", config.vocab_size_padded), False),
    )
