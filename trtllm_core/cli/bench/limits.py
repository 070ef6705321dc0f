"""What a step must read or compute at least, and so how fast it could be."""

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


def prompt_operations(runner: ModelRunner, work: Workload) -> float:
    """Operations that prompts take at least: products with all matrices, and attention to what each token sees.

    Logits are those of each prompt's last token. A product of two numbers and its sum are two operations.
    """
    from trtllm_core.backends.modules import meta_module
    from trtllm_core.nn import Attention
    from trtllm_core.nn.embedding import LMHead
    from trtllm_core.nn.linear import Linear
    from trtllm_core.parallel import TensorParallel

    config, build = runner.config, runner.config.build
    family = runner.generation.plugins.model_families.get(config.family.name).load()()
    # Without memory and before anything was packed: the sizes that the family says.
    layers = [*meta_module(config.replace(quantization=None), family, TensorParallel(0, build.tp_size)).modules()]
    each = sum(one.weight.numel() for one in layers if isinstance(one, Linear) and not isinstance(one, LMHead))
    heads = [one.weight.numel() for one in layers if isinstance(one, LMHead)]
    seen = sum(
        one.num_heads * one.head_size * _pairs(work.prompt_len, one.sliding_window)
        for one in layers
        if isinstance(one, Attention)
    )
    return work.batch * (2 * each * work.prompt_len + 2 * heads[-1] + 4 * seen)


def _pairs(length: int, window: int | None) -> float:
    """Pairs of a token and one that it sees, itself included."""
    width = min(window or length, length)
    return width * (width + 1) / 2 + (length - width) * width


def speed_limit(runner: ModelRunner, work: Workload, bandwidth: float, operations: float) -> float:
    """Tokens a second if one thing were all that a run waits for: of prompts arithmetic, in decoding memory.

    Args:
        bandwidth: bytes a second that the device reads.
        operations: a second that it does in products of matrices.
    """
    if work.is_prefill:
        return work.batch * work.prompt_len * operations / prompt_operations(runner, work)
    return work.batch * bandwidth / step_bytes(runner, work)
