"""The classic, mutable ``SamplingConfig``, and how it becomes ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from trtllm_core.compat.tensorrt_llm.logger import logger
from trtllm_core.config import SamplingConfig as CoreConfig
from trtllm_core.decoding.words import from_word_list_format

Number = Any
"""A number, or a tensor, array or list of one for each request."""


@dataclass
class SamplingConfig:
    """What to choose and when to end. Positions, names and defaults are the classic ones; fields may be set later.

    Any number may be a tensor, an array or a list with an entry for each request.
    """

    end_id: int | None
    pad_id: int | None
    max_new_tokens: int = 20
    num_beams: int = 1
    max_attention_window_size: Number = None
    sink_token_length: int | None = None
    output_sequence_lengths: bool = False
    return_dict: bool = False
    stop_words_list: Any = None
    """What ``to_word_list_format`` makes (``[batch, 2, length]``), or lists of token ids: words of requests."""
    bad_words_list: Any = None
    temperature: Number = 1.0
    top_k: Number = 1
    top_p: Number = 0.0
    top_p_decay: Number = None
    top_p_min: Number = None
    top_p_reset_ids: Number = None
    length_penalty: Number = 1.0
    early_stopping: Number = 1
    repetition_penalty: Number = 1.0
    min_length: Number = 1
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    use_beam_hyps: bool = True
    min_p: Number = field(default=None, kw_only=True)
    no_repeat_ngram_size: Number = field(default=None, kw_only=True)
    prompt_ignore_length: Number = field(default=None, kw_only=True)
    beam_width_array: Sequence[int] | None = field(default=None, kw_only=True)
    num_return_sequences: int | None = field(default=None, kw_only=True)
    embedding_bias: Any = field(default=None, kw_only=True)
    normalize_log_probs: bool | None = field(default=None, kw_only=True)
    beam_search_diversity_rate: Number = field(init=False, default=0.0)
    random_seed: Number = field(init=False, default=None)
    output_cum_log_probs: bool = field(init=False, default=False)
    output_log_probs: bool = field(init=False, default=False)

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set fields, and return what is none of them."""
        known = {each.name for each in fields(self)}
        for name in known & kwargs.keys():
            setattr(self, name, kwargs[name])
        return {name: value for name, value in kwargs.items() if name not in known}


BEAMS = ("length_penalty", "early_stopping", "beam_search_diversity_rate", "beam_width_array", "use_beam_hyps")
"""Fields that mean nothing to a request of one beam."""

LIMITS = {"top_k": (0, 1024), "top_p": (0.0, 1.0)}
"""The classic runtime cut these to their range, with a warning."""


def core_configs(config: SamplingConfig, prompts: Sequence[Sequence[int]]) -> list[CoreConfig]:
    """One config of ours for each prompt.

    ``end_id`` -1 never ends. Without ``random_seed`` it is 0 for every request, as it was: the same script draws the
    same tokens each time, and equal prompts get equal answers. Positions after the end hold ``end_id``.

    Raises:
        ConfigError: a number with neither one entry nor one for each request, or a value out of its range.
    """
    given = {name: value for name, value in vars(config).items() if value is not None}
    windows = given.pop("max_attention_window_size", None)
    sinks = given.pop("sink_token_length", None)
    if config.num_beams == 1:
        given = {name: value for name, value in given.items() if name not in BEAMS}
    pad = given.pop("pad_id", None)
    if config.end_id is not None and config.end_id < 0:
        given |= {"end_id": (), "pad_id": pad}
    fields = {name: _in_range(name, _plain(name, value)) for name, value in given.items()}
    rows = CoreConfig.for_batch(len(prompts), **{"random_seed": 0, **fields})
    own = [_cache_fields(windows, sinks, len(prompt) + config.max_new_tokens) for prompt in prompts]
    return [row.replace(**fields) if fields else row for row, fields in zip(rows, own, strict=True)]


def _plain(name: str, value: Any) -> Any:
    """Tensors and arrays of numbers as lists, whatever their shape; words as lists of words."""
    array = isinstance(value, (torch.Tensor, np.ndarray))
    if name in ("stop_words_list", "bad_words_list"):
        if not array:
            return [row or () for row in value]
        return from_word_list_format(value.cpu().long() if isinstance(value, torch.Tensor) else value)
    return value.reshape(-1).tolist() if array and name != "embedding_bias" else value


def _in_range(name: str, value: Any) -> Any:
    if name not in LIMITS:
        return value
    if isinstance(value, (list, tuple)):
        return [_in_range(name, item) for item in value]
    low, high = LIMITS[name]
    cut = min(max(value, low), high)
    if cut != value:
        logger.warning(f"{name} {value} is out of range, {cut} is used")
    return cut


def _cache_fields(windows: Any, sinks: int | None, length: int) -> dict[str, Any]:
    """Windows, one for all layers or one for each, and sinks; nothing where the whole sequence fits."""
    windows = _plain("", windows)
    sizes = [int(size) for size in (windows if isinstance(windows, (list, tuple)) else [windows or length])]
    if min(sizes) >= length:
        return {}
    window: Any = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
    return {"max_attention_window_size": window, **({"sink_token_length": sinks} if sinks else {})}
