"""What a step must read at least, and so how fast it could be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_core.cli.bench.workloads import Workload

if TYPE_CHECKING:
    from trtllm_core.runner import ModelRunner


def step_bytes(runner: ModelRunner, work: Workload) -> float:
    """Bytes that a decode step must read: the weights, and the KV cache at its mean length."""
    per_token = runner.config.model.kv_bytes_per_token(runner.config.kv_dtype, runner.config.build.tp_size)
    read = runner.context_mem_size - looked_up(runner)
    return read + work.batch * (work.prompt_len + work.new_tokens / 2) * per_token


def looked_up(runner: ModelRunner) -> int:
    """Bytes of tables of which a step reads a row for each sequence, and not the whole.

    Those are learned positions, and the token embedding where it is not the head too. Backends whose executables have
    no module of ours count as if they read all.
    """
    from trtllm_core.nn.embedding import LMHead, PositionEmbedding, VocabParallelEmbedding

    module = getattr(runner.session.engine, "module", None)
    layers = [] if module is None else list(module.modules())
    heads = [layer for layer in layers if isinstance(layer, LMHead) and not isinstance(layer, VocabParallelEmbedding)]
    tables = (PositionEmbedding, VocabParallelEmbedding) if heads else (PositionEmbedding,)
    return sum(one.nbytes for layer in layers if isinstance(layer, tables) for one in layer.parameters())


def decode_limit(runner: ModelRunner, work: Workload, bandwidth: float) -> float | None:
    """Generated tokens a second if memory were all that a step waits for; None where prompts are what is read."""
    return None if work.is_prefill else work.batch * bandwidth / step_bytes(runner, work)
