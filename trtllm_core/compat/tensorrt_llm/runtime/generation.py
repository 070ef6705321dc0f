"""The classic ``GenerationSession``, and what else scripts import from this path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trtllm_core.compat.classic import classic_plugins
from trtllm_core.compat.tensorrt_llm.gone import refuse
from trtllm_core.compat.tensorrt_llm.mapping import Mapping, core_mapping
from trtllm_core.compat.tensorrt_llm.runtime.callbacks import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from trtllm_core.compat.tensorrt_llm.runtime.kv_cache_manager import GenerationSequence, KVCacheManager
from trtllm_core.compat.tensorrt_llm.runtime.loading import load_options
from trtllm_core.compat.tensorrt_llm.runtime.model_config import ModelConfig, check_model_config
from trtllm_core.compat.tensorrt_llm.runtime.sampling import SamplingConfig, core_configs
from trtllm_core.compat.tensorrt_llm.runtime.session import Session, TensorInfo
from trtllm_core.compat.tensorrt_llm.runtime.words import decode_words_list, to_word_list_format
from trtllm_core.config import Mapping as CoreMapping
from trtllm_core.engine.load import config_of
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.generation import GenerationSession as CoreGenerationSession
from trtllm_core.plugin import LogitsProcessor as CoreProcessor
from trtllm_core.plugin import Plugins
from trtllm_core.plugin import StoppingCriterion as CoreCriterion
from trtllm_core.prompt_table import by_task
from trtllm_core.properties import EngineProperties

__all__ = [
    "GenerationSequence",
    "GenerationSession",
    "KVCacheManager",
    "LogitsProcessor",
    "LogitsProcessorList",
    "ModelConfig",
    "SamplingConfig",
    "Session",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TensorInfo",
    "decode_words_list",
    "to_word_list_format",
]

_LOOP = "the loop is trtllm_core.loop.StepLoop, which plugins change"
GONE = {
    **dict.fromkeys(("handle_per_step", "finalize_decoder", "decode_regular", "early_stop_criteria"), _LOOP),
    **dict.fromkeys(("buffer", "profiler", "engine_inspector"), _LOOP),
    **dict.fromkeys(
        (
            "find_best_medusa_path",
            "filter_medusa_logits",
            "get_next_medusa_tokens",
            "update_kv_cache_draft_token_location",
            "update_output_ids_by_offset",
            "next_medusa_input_ids",
            "process_logits_for_medusa_mode",
        ),
        "there are no Medusa heads; for speculation choose a decoder",
    ),
}
"""Methods of the classic class that have no counterpart, and what stands in their place."""


class GenerationSession(EngineProperties):
    """Ours, with the classic arguments and results.

    Args:
        model_config: what the engine is, which is held against it; None asks for nothing.
        engine_buffer: a rank's file by path, its bytes or a mapping of it, or a ``Session``.
        mapping: this rank's place.
        debug_mode: checks shapes, dtypes and NaN after every plugin, and keeps the tensors of the engine's last run.
        debug_tensors_to_save: which of them; None: all.
        cuda_graph_mode: a wish that changes no token: the backend decides.
        stream: kept as an attribute.
    """

    def __init__(
        self,
        model_config: ModelConfig | None,
        engine_buffer: Any,
        mapping: Mapping | CoreMapping | None = None,
        debug_mode: bool = False,
        debug_tensors_to_save: Sequence[str] | None = None,
        cuda_graph_mode: bool = False,
        stream: Any = None,
        **core: Any,
    ) -> None:
        place = core_mapping(mapping) or CoreMapping()
        plugins = core.pop("plugins", None) or Plugins.load()
        if not isinstance(engine_buffer, Session):
            source = Path(engine_buffer) if isinstance(engine_buffer, str) else engine_buffer
            options = load_options(config_of(source, plugins), place)
            engine_buffer = Session.from_serialized_engine(source, plugins=plugins, **options)
        self.core = CoreGenerationSession(
            None, engine_buffer, place, debug_mode, debug_tensors_to_save, plugins=plugins, **core
        )
        self.session = self.core.session
        self.mapping = place
        self.cuda_graph_mode = cuda_graph_mode
        self.stream = stream
        if model_config is not None:
            check_model_config(model_config, self)
        self._shape: tuple[int, int, int, int] | None = None
        self._lora_uids: Sequence[str] | None = None

    @property
    def debug_buffer(self) -> dict[str, torch.Tensor]:
        """In debug mode, the tensors of the engine's last run, by name, on the CPU."""
        return {} if self.session.debug is None else self.session.debug.tensors

    def dump_debug_buffers(self, step: int) -> None:
        """Write them as ``tllm_debug/PP_{rank}/TP_{rank}/{name}-step{step}.npy``.

        Raises:
            ConfigError: the session is not in debug mode.
        """
        if self.session.debug is None:
            raise ConfigError("dump_debug_buffers: the session was made without debug_mode")
        place = Path("tllm_debug") / f"PP_{self.mapping.pp_rank}" / f"TP_{self.mapping.tp_rank}"
        self.session.debug.write(place, step)

    def setup(
        self,
        batch_size: int,
        max_context_length: int,
        max_new_tokens: int,
        beam_width: int = 1,
        max_attention_window_size: Any = None,
        sink_token_length: int | None = None,
        encoder_max_input_length: int | None = None,
        lora_manager: Any = None,
        lora_uids: Sequence[str] | None = None,
        medusa_choices: Any = None,
    ) -> None:
        """Say what the next ``decode`` is at most. The window and sinks that count are those of its SamplingConfig.

        Raises:
            CapacityError: (a ``RuntimeError``) more than the engine was built for.
            ConfigError: something that is not there.
        """
        refuse(
            "GenerationSession.setup",
            encoder_max_input_length=encoder_max_input_length,
            lora_manager=None if lora_manager is self.core.lora else lora_manager,
            medusa_choices=medusa_choices,
        )
        build = self.config.build
        for name, asked, most in (
            ("batch_size", batch_size, build.max_batch_size),
            ("max_context_length", max_context_length, build.max_input_len),
            ("max_context_length + max_new_tokens", max_context_length + max_new_tokens, build.max_seq_len),
            ("beam_width", beam_width, build.max_beam_width),
        ):
            if not 1 <= asked <= most:
                raise CapacityError(f"{name} is {asked}; the engine was built for 1 to {most}")
        self._shape = (batch_size, max_context_length, max_new_tokens, beam_width)
        self._lora_uids = lora_uids
        self._cache = {"max_attention_window_size": max_attention_window_size, "sink_token_length": sink_token_length}

    def decode(
        self,
        input_ids: torch.Tensor,
        context_lengths: torch.Tensor,
        sampling_config: SamplingConfig,
        prompt_embedding_table: Any = None,
        tasks: Any = None,
        prompt_vocab_size: Any = None,
        stop_words_list: Any = None,
        bad_words_list: Any = None,
        no_repeat_ngram_size: Any = None,
        streaming: bool = False,
        output_sequence_lengths: bool = False,
        return_dict: bool = False,
        encoder_output: Any = None,
        encoder_input_lengths: Any = None,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        cross_attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate for the batch of ``setup``.

        ``input_ids`` is padded ``[batch, length]``, or packed ``[tokens]`` or ``[1, tokens]``. Returns int32
        ``[batch, beams, length]``, or with ``return_dict`` a dictionary; with ``streaming`` an iterator over either, as
        they stand after each step.

        Raises:
            ConfigError: ``setup`` was not called, or for another shape; or something that is not there.
        """
        refuse(
            "GenerationSession.decode",
            encoder_output=encoder_output,
            encoder_input_lengths=encoder_input_lengths,
            cross_attention_mask=cross_attention_mask,
            **kwargs,
        )
        prompts = unpacked(input_ids, context_lengths)
        self._check_setup(prompts, sampling_config)
        given = {
            "stop_words_list": stop_words_list,
            "bad_words_list": bad_words_list,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "output_sequence_lengths": output_sequence_lengths or None,
            "return_dict": return_dict or None,
            **{name: value for name, value in self._cache.items() if getattr(sampling_config, name) is None},
        }
        changed = copied(sampling_config)
        changed.update(**{name: value for name, value in given.items() if value is not None})
        table = None if prompt_embedding_table is None else by_task(prompt_embedding_table, prompt_vocab_size)
        return self.generate(
            prompts,
            changed,
            streaming,
            stopping_criteria,
            logits_processor,
            prompt_table=table,
            prompt_tasks=None if table is None else tasks,  # classic callers pass a dummy where there is no table
            lora_uids=self._lora_uids,
        )

    def decode_batch(
        self, input_ids: Sequence[torch.Tensor], sampling_config: SamplingConfig, streaming: bool = False, **kwargs: Any
    ) -> Any:
        """As ``decode``, for a list of prompts."""
        lengths = torch.tensor([len(prompt) for prompt in input_ids])
        return self.decode(torch.cat([*input_ids]), lengths, sampling_config, streaming=streaming, **kwargs)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig,
        streaming: bool = False,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        **core: Any,
    ) -> Any:
        """What ``decode`` and ``ModelRunner.generate`` do: translate, run, and give the classic result."""
        configs = core_configs(config, prompts)
        length = max(map(len, prompts), default=0) + config.max_new_tokens
        processors, own_processors = _of_kind(logits_processor, CoreProcessor, LogitsProcessorList)
        criteria, own_criteria = _of_kind(stopping_criteria, CoreCriterion, StoppingCriteriaList)
        width = 1
        if processors is not None or criteria is not None:
            width = max(self.core.explain(each).branching.max_branches for each in configs)
        classic = classic_plugins(processors, criteria, len(prompts), width, length)
        result = self.core.decode_batch(
            prompts,
            configs,
            streaming,
            [*own_criteria, *classic[1]] or None,
            [*classic[0], *own_processors] or None,
            full=streaming,
            **core,
        )
        if streaming:
            return self._stream(result)
        if isinstance(result, dict):
            for output in result["outputs"]:
                if output.error is not None:
                    raise output.error
        return _to(result, self.device)

    def _stream(self, results: Iterator[Any]) -> Iterator[Any]:
        for result in results:
            yield _to(result, self.device)

    def _check_setup(self, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
        if self._shape is None:
            raise ConfigError("call setup(batch_size, max_context_length, max_new_tokens) before decode")
        batch, context, new, beams = self._shape
        longest = max(map(len, prompts), default=0)
        given = (len(prompts), longest, config.max_new_tokens, config.num_beams)
        if given[0] != batch or longest > context or given[2] > new or given[3] != beams:
            raise ConfigError(
                f"setup was for {batch} sequences of up to {context} + {new} tokens and {beams} beams; decode got "
                f"{given[0]} of up to {longest} + {given[2]} and {given[3]}"
            )

    def __getattr__(self, name: str) -> Any:
        if name in GONE:
            raise AttributeError(f"GenerationSession.{name} is not carried on: {GONE[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def copied(config: SamplingConfig) -> SamplingConfig:
    """A copy whose fields may be set; tensors in it are shared."""
    copy = SamplingConfig(config.end_id, config.pad_id)
    copy.update(**vars(config))
    return copy


def unpacked(input_ids: torch.Tensor, context_lengths: torch.Tensor) -> list[list[int]]:
    """The prompts of a padded or packed batch.

    Raises:
        ConfigError: the lengths do not fit it.
    """
    sizes = context_lengths.reshape(-1).tolist()
    if input_ids.dim() == 1 or (len(input_ids) == 1 and len(sizes) > 1):
        flat = input_ids.reshape(-1)
        if len(flat) != sum(sizes):
            raise ConfigError(f"packed input_ids has {len(flat)} tokens; context_lengths add up to {sum(sizes)}")
        return [part.tolist() for part in torch.split(flat, sizes)]
    if len(input_ids) != len(sizes) or max(sizes, default=0) > input_ids.shape[1]:
        raise ConfigError(f"input_ids {list(input_ids.shape)} does not fit context_lengths {sizes}")
    return [row[:size].tolist() for row, size in zip(input_ids, sizes, strict=True)]


def _of_kind(given: Any, ours: type, group: type) -> tuple[Any, list[Any]]:
    """A classic callback, or None, and plugins of ours that were passed in its place."""
    if given is None:
        return None, []
    things = given if type(given) in (list, tuple) else [given]
    plugins = [thing for thing in things if isinstance(thing, ours)]
    callbacks = [thing for thing in things if not isinstance(thing, ours)]
    return (callbacks[0] if len(callbacks) == 1 else group(callbacks) if callbacks else None), plugins


def _to(result: Any, device: torch.device) -> Any:
    """Tensors of a result, on the engine's device, where they were."""
    if isinstance(result, torch.Tensor):
        return result.to(device)
    if isinstance(result, list):
        return [_to(each, device) for each in result]
    return {name: _to(value, device) for name, value in result.items()} if isinstance(result, dict) else result
