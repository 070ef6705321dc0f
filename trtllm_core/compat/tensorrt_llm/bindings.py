"""The C++ runtime's ``GptDecoder`` and what it takes: choosing tokens from logits that somebody else computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import torch

from trtllm_core.compat.tensorrt_llm.accepting import (
    FinishedState,
    accept_draft_tokens_by_ids,
    accept_draft_tokens_by_logits,
)
from trtllm_core.compat.tensorrt_llm.gone import refuse
from trtllm_core.compat.tensorrt_llm.runtime.words import to_word_list_format
from trtllm_core.config import SamplingConfig as CoreConfig
from trtllm_core.config import WorldConfig
from trtllm_core.decoding.words import from_word_list_format
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin import Plugins
from trtllm_core.standalone import Rows, StandaloneDecoder

__all__ = [
    "DataType",
    "DecodingInput",
    "DecodingMode",
    "DecodingOutput",
    "FinishedState",
    "GptDecoder",
    "SamplingConfig",
    "WorldConfig",
    "to_word_list_format",
]


class DataType(Enum):
    """Of logits. Decoding works in float32, whatever they are."""

    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"


class DecodingMode(Enum):
    """What kind of decoding. The fields of ``SamplingConfig`` say it all; only Medusa is not there."""

    NONE = "none"
    TOP_K = "top_k"
    TOP_P = "top_p"
    TOP_K_TOP_P = "top_k_top_p"
    BEAM_SEARCH = "beam_search"
    MEDUSA = "medusa"


@dataclass
class SamplingConfig:
    """The C++ config: each field is None, or a list of one value for all sequences or one for each."""

    beam_width: int = 1
    temperature: Sequence[float] | None = None
    top_k: Sequence[int] | None = None
    top_p: Sequence[float] | None = None
    top_p_decay: Sequence[float] | None = None
    top_p_min: Sequence[float] | None = None
    top_p_reset_ids: Sequence[int] | None = None
    random_seed: Sequence[int] | None = None
    min_length: Sequence[int] | None = None
    repetition_penalty: Sequence[float] | None = None
    presence_penalty: Sequence[float] | None = None
    frequency_penalty: Sequence[float] | None = None
    length_penalty: Sequence[float] | None = None
    early_stopping: Sequence[int] | None = None
    beam_search_diversity_rate: Sequence[float] | None = None
    normalize_log_probs: bool | None = None


@dataclass
class DecodingInput:
    """What a step is given. Batches are rows of every tensor."""

    logits: torch.Tensor
    """``[batch, beams, vocab_size_padded]``; in the first step only beam 0 is read."""
    end_ids: torch.Tensor
    """Integers ``[batch]``; -1 never ends."""
    sequence_limit_length: torch.Tensor | None = None
    """Integers ``[batch]``: prompt and generated tokens together; None is the decoder's maximum."""
    embedding_bias: torch.Tensor | None = None
    """``[batch, vocab_size]``."""
    bad_words_list: Any = None
    """As ``to_word_list_format`` makes it."""
    stop_words_list: Any = None
    no_repeat_ngram_size: torch.Tensor | None = None
    """Integers ``[batch]``."""


@dataclass
class DecodingOutput:
    """What a step writes. ``ids`` and ``lengths`` hold the prompts before the first one."""

    ids: torch.Tensor
    """int32 ``[batch, beams, max_sequence_length]``."""
    lengths: torch.Tensor
    """int32 ``[batch, beams]``: tokens of prompt and text, without an end token."""
    new_tokens: torch.Tensor = field(init=False)
    """int32 ``[batch, beams]``: what the last step chose."""
    parent_ids: torch.Tensor = field(init=False)
    """int32 ``[batch, beams]``: the beam that each one continues, whose cache it goes on with."""
    finished: torch.Tensor = field(init=False)
    """bool ``[batch, beams]``."""
    log_probs: torch.Tensor = field(init=False)
    """float32 as ``ids``."""
    cum_log_probs: torch.Tensor = field(init=False)
    """float32 ``[batch, beams]``."""

    def __post_init__(self) -> None:
        self.new_tokens, self.parent_ids = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        self.finished = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.log_probs = torch.zeros(self.ids.shape, device=self.ids.device)
        self.cum_log_probs = torch.zeros(self.lengths.shape, device=self.ids.device)

    @property
    def finished_sum(self) -> int:
        """Sequences that are finished."""
        return int(self.finished.sum())


class GptDecoder:
    """Chooses tokens for a batch, step by step, from logits that the caller brings.

    It is a front of :class:`trtllm_core.StandaloneDecoder`, which honours everything that a session honours.

    Args:
        mode, dtype: as in C++; see there what they still mean.
        vocab_size_padded: width of the logits; columns from ``vocab_size`` on are never chosen.
        max_sequence_length: prompt and generated tokens together.
        plugins: where decoders, processors and criteria are looked up; None loads what is installed.
    """

    def __init__(
        self,
        mode: DecodingMode,
        dtype: DataType,
        max_batch_size: int,
        max_beam_width: int,
        vocab_size: int,
        vocab_size_padded: int,
        max_sequence_length: int,
        *,
        device: torch.device | str = "cpu",
        plugins: Plugins | None = None,
    ) -> None:
        refuse("GptDecoder", medusa=mode is DecodingMode.MEDUSA)
        if vocab_size_padded < vocab_size:
            raise ConfigError(f"vocab_size_padded {vocab_size_padded} is less than vocab_size {vocab_size}")
        self.vocab_size, self.vocab_size_padded = vocab_size, vocab_size_padded
        self._most = max_batch_size, max_sequence_length
        self._decoder = StandaloneDecoder(
            vocab_size,
            max_batch_size=max_batch_size,
            max_beam_width=max_beam_width,
            max_seq_len=max_sequence_length,
            device=device,
            plugins=plugins,
        )
        self._config: SamplingConfig | None = None
        self._rows: Rows | None = None

    def setup(self, sampling_config: SamplingConfig, batch_size: int, max_sequence_length: int | None = None) -> None:
        """Begin a batch. What was decoded before is given up.

        Raises:
            CapacityError: more sequences, or longer ones, than the decoder was made for.
        """
        most, longest = self._most
        length = max_sequence_length or longest
        if batch_size > most or length > longest:
            raise CapacityError(
                f"{batch_size} sequences of {length} tokens; the decoder was made for {most} of {longest}"
            )
        self._decoder.cancel()
        self._rows = None
        self._config, self._batch, self._length = sampling_config, batch_size, length

    accept_draft_tokens_by_ids = staticmethod(accept_draft_tokens_by_ids)
    accept_draft_tokens_by_logits = staticmethod(accept_draft_tokens_by_logits)

    def get_sampling_config(self) -> SamplingConfig:
        """What ``setup`` was given."""
        if self._config is None:
            raise ConfigError("call setup before anything else")
        return self._config

    def forward(self, output: DecodingOutput, inputs: DecodingInput) -> bool:
        """Choose the next token of each sequence that is not finished, and write it. Returns whether all are.

        While a request searches, its rows are its beams; once it is over, the sequences that it returns, best first.

        Raises:
            ConfigError: ``setup`` was not called; a tensor of another shape; or a field that nothing honours.
            PluginError: what a plugin raised.
        """
        config, shape = self.get_sampling_config(), tuple(inputs.logits.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != (self._batch, self.vocab_size_padded):
            raise ConfigError(f"logits {list(shape)} are not [{self._batch}, beams, {self.vocab_size_padded}]")
        decoder, rows = self._decoder, self._rows
        if rows is None:
            rows = decoder.begin(*self._requests(config, output, inputs))
        before = {row: {one.tokens: beam for beam, one in decoder.sequences(row).items()} for row in rows.prompts}
        if len(rows):
            place = torch.tensor([rows.prompts, rows.branches], device=inputs.logits.device)
            rows = decoder.step(inputs.logits[place[0], place[1]])
        self._rows = rows
        for error in decoder.errors:
            if error is not None:
                raise error
        for row, beams in before.items():
            self._write(output, row, beams, over=row not in rows.prompts)
        return decoder.over

    def _write(self, output: DecodingOutput, row: int, before: Mapping[Sequence[int], int], over: bool) -> None:
        """What a request has so far, into its row: its beams while they run, what it returns once it is over.

        ``before`` says which beam had generated which tokens before the step.
        """
        prompt = self._prompts[row]
        for beam, one in self._decoder.sequences(row).items():
            start, end = len(prompt), len(prompt) + len(one.tokens)
            output.ids[row, beam, :end] = torch.tensor([*prompt, *one.tokens], dtype=torch.int32)
            output.lengths[row, beam] = start + one.length
            output.new_tokens[row, beam] = one.tokens[-1] if one.tokens else 0
            output.parent_ids[row, beam] = before.get(one.tokens[:-1], 0)
            output.finished[row, beam] = over
            output.log_probs[row, beam, start : start + len(one.log_probs)] = torch.tensor(one.log_probs)
            output.cum_log_probs[row, beam] = one.cum_log_prob

    def _requests(
        self, config: SamplingConfig, output: DecodingOutput, inputs: DecodingInput
    ) -> tuple[list[list[int]], list[CoreConfig]]:
        """Prompts, and what is asked of each."""
        given = {each.name: getattr(config, each.name) for each in fields(config)}
        columns = {name: value for name, value in given.items() if value is not None and name != "beam_width"}
        words = {name: getattr(inputs, name) for name in ("stop_words_list", "bad_words_list")}
        columns |= {name: from_word_list_format(value) for name, value in words.items() if value is not None}
        for name in ("embedding_bias", "no_repeat_ngram_size"):
            if getattr(inputs, name) is not None:
                columns[name] = getattr(inputs, name).tolist()
        prompts = [output.ids[row, 0, : int(output.lengths[row, 0])].tolist() for row in range(self._batch)]
        limits = [self._length] * self._batch
        if inputs.sequence_limit_length is not None:
            limits = inputs.sequence_limit_length.tolist()
        defaults = {"random_seed": 0, "top_k": 0, **({"length_penalty": 0.0} if config.beam_width > 1 else {})}
        configs = CoreConfig.for_batch(self._batch, **defaults | columns, num_beams=config.beam_width)
        own = [
            {"end_id": () if end < 0 else end, "max_new_tokens": limit - len(prompt)}
            for prompt, end, limit in zip(prompts, inputs.end_ids.tolist(), limits, strict=True)
        ]
        self._prompts = prompts
        scored = {"output_log_probs": True, "output_cum_log_probs": True}
        return prompts, [each.replace(**one, **scored) for each, one in zip(configs, own, strict=True)]
