"""The classic, mutable ``SamplingConfig``, and how it becomes ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from trtllm_core.compat.tensorrt_llm.logger import logger
from trtllm_core.config import SamplingConfig as CoreConfig
from trtllm_core.decoding.words import from_word_list_format
from trtllm_core.errors import ConfigError

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

NUMBERS = (
    "temperature",
    "top_k",
    "top_p",
    "top_p_decay",
    "top_p_min",
    "top_p_reset_ids",
    "repetition_penalty",
    "min_length",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "no_repeat_ngram_size",
    "prompt_ignore_length",
    "random_seed",
)

PLAIN = (
    "max_new_tokens",
    "sink_token_length",
    "output_sequence_lengths",
    "return_dict",
    "output_cum_log_probs",
    "output_log_probs",
    "num_return_sequences",
)


def core_configs(config: SamplingConfig, prompts: Sequence[Sequence[int]]) -> list[CoreConfig]:
    """One config of ours for each prompt.

    ``end_id`` -1 never ends. Without ``random_seed`` it is 0 for every request, as it was: the same script draws the
    same tokens each time, and equal prompts get equal answers. Positions after the end hold ``end_id``.

    Raises:
        ConfigError: a number with neither one entry nor one for each request, or a value out of its range.
    """
    batch = len(prompts)
    columns = {name: _column(name, getattr(config, name), batch) for name in NUMBERS}
    if config.num_beams > 1:
        columns |= {name: _column(name, getattr(config, name), batch) for name in BEAMS if name != "beam_width_array"}
    words = {name: _words(name, getattr(config, name), batch) for name in ("stop_words_list", "bad_words_list")}
    whole: dict[str, Any] = {name: getattr(config, name) for name in PLAIN}
    whole |= {"num_beams": config.num_beams, "sink_token_length": config.sink_token_length or None}
    if config.num_beams > 1:
        whole["beam_width_array"] = config.beam_width_array
    if config.end_id is not None:
        whole["end_id"] = () if config.end_id < 0 else int(config.end_id)
        if config.end_id < 0:
            whole["pad_id"] = config.pad_id
    out = []
    for row, prompt in enumerate(prompts):
        own = {name: _in_range(name, column[row]) for name, column in (columns | words).items()}
        own["random_seed"] = own["random_seed"] or 0
        own["max_attention_window_size"] = _window(
            config.max_attention_window_size, len(prompt) + config.max_new_tokens
        )
        out.append(CoreConfig(**{name: value for name, value in (whole | own).items() if value is not None}))
    return out


def _column(name: str, value: Any, batch: int) -> list[Any]:
    """A value for each request."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = value.reshape(-1).tolist()
    if not isinstance(value, (list, tuple)):
        return [value] * batch
    if len(value) not in (1, batch):
        raise ConfigError(f"SamplingConfig.{name} has {len(value)} entries for {batch} requests: give 1 or {batch}")
    return list(value) * (batch if len(value) == 1 else 1)


def _in_range(name: str, value: Any) -> Any:
    """The classic runtime cut these two to their range, with a warning."""
    limits = {"top_k": (0, 1024), "top_p": (0.0, 1.0)}
    if name not in limits or value is None:
        return value
    low, high = limits[name]
    cut = min(max(value, low), high)
    if cut != value:
        logger.warning(f"{name} {value} is out of range, {cut} is used")
    return cut


def _words(name: str, value: Any, batch: int) -> list[Any]:
    """The words of each request. One list of words serves all requests."""
    if value is None:
        return [None] * batch
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = from_word_list_format(value.cpu().long() if isinstance(value, torch.Tensor) else value)
    rows = [tuple(tuple(map(int, word)) for word in row or ()) for row in value]
    if len(rows) not in (1, batch):
        raise ConfigError(f"SamplingConfig.{name} is for {len(rows)} requests, not {batch}")
    return rows * (batch if len(rows) == 1 else 1)


def _window(value: Any, length: int) -> Any:
    """A window, or one for each layer, unless the whole sequence fits."""
    if value is None:
        return None
    sizes = value.reshape(-1).tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value
    sizes = [int(size) for size in (sizes if isinstance(sizes, (list, tuple)) else [sizes])]
    if min(sizes, default=math.inf) >= length:
        return None
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
