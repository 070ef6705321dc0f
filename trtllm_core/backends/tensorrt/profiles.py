"""The shapes that the profiles of an engine admit."""

from __future__ import annotations

from collections.abc import Iterator

from trtllm_core.backends.linear.contract import cache_names
from trtllm_core.backends.tensorrt.options import TensorRTOptions
from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.plugin.inspection import Bounds

CONTEXT, GENERATION = 0, 1
"""Which profile is which."""


def profile_sizes(build: BuildConfig, options: TensorRTOptions) -> tuple[tuple[int, int], tuple[int, int]]:
    """Most tokens a row, and most logits a row, of the context profile and of the generation profile."""
    verify = options.max_draft_len + 1
    context = min(build.max_num_tokens, build.max_input_len)
    return (context, context if options.gather_all_token_logits else verify), (verify, verify)


def input_bounds(name: str, shape: tuple[int, ...], build: BuildConfig, tokens: int, asked: int) -> Bounds:
    """Smallest, usual and largest shape of an input in a profile; -1 in ``shape`` is a size that is not fixed.

    A profile is tuned for half a batch of half its tokens, and for one token where that is its most.
    """
    most = {"input_ids": (build.max_branches, tokens), "logit_indices": (build.max_branches, asked)}
    largest = most.get(name, tuple(build.max_branches if size == -1 else size for size in shape))
    smallest = tuple(1 if size == -1 else size for size in shape)
    usual = tuple(max(1, n // 2) if size == -1 else size for size, n in zip(shape, largest, strict=True))
    return smallest, usual, largest


def profile_shapes(config: EngineConfig, options: TensorRTOptions) -> Iterator[dict[str, Bounds]]:
    """The bounds of every input that is not a weight, for the context profile and then for the generation profile."""
    model, build = config.model, config.build
    cache = (-1, model.num_kv_heads, build.max_seq_len, model.head_size)
    inputs = {"input_ids": (-1, -1), "write_indices": (-1,), "logit_indices": (-1, -1)}
    inputs |= dict.fromkeys(cache_names(model.num_layers, "past"), cache)
    for tokens, asked in profile_sizes(build, options):
        yield {name: input_bounds(name, shape, build, tokens, asked) for name, shape in inputs.items()}
