"""``GenerationSession``: a static batch of sequences, generated to their ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import torch

from trtllm_core.assembling import make_loop
from trtllm_core.batch_input import make_requests, unpack
from trtllm_core.batch_shape import BatchShape
from trtllm_core.checkpoint import Tokenizer
from trtllm_core.config import KVCacheConfig, Mapping, ModelConfig, SamplingConfig, with_fields
from trtllm_core.debugging import DebugBuffers
from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.engine.load import Serialized
from trtllm_core.errors import ConfigError
from trtllm_core.kv_cache.making import make_cache, with_window
from trtllm_core.lora import LoraManager
from trtllm_core.outputs import batch_result, check_ids_suffice, outputs_of, partial_results
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import LogitsProcessor, Plugins, StoppingCriterion
from trtllm_core.plugin.observer import SessionStats
from trtllm_core.prompt_table import Table, by_task
from trtllm_core.properties import EngineProperties
from trtllm_core.session import Session
from trtllm_core.static_batch import StaticBatch


class GenerationSession(EngineProperties):
    """Generates for a static batch, over the same ``StepLoop`` that in-flight batching uses.

    Finished sequences leave the batch at once and free their blocks; sequences that find no room wait for some.

    Args:
        model_config: what the engine must be of; None takes the engine's own.
        engine_buffer: a rank's engine: path, mapping or bytes, or a ``Session``.
        mapping: this rank's place; None is a world of one.
        debug_mode: checks shapes, dtypes and NaN after every plugin, and keeps the tensors of the engine's last run
            for ``dump_debug_buffers``; without CUDA graphs.
        debug_tensors_to_save: names of those that are kept; None: all.
        debug_dir: a folder for the tensors of every run; None: only those that are asked for are written.
        kv_cache: policy and size of the KV cache.
        plugins: where everything is looked up; None loads what is installed.
        tokenizer: of the engine; needed by stop strings and text deltas.
        end_ids: tokens that end a sequence where its SamplingConfig names none; None takes the tokenizer's.
        clock: seconds since some moment, for time limits; of several ranks, rank 0's counts.
        look_ahead: launch a step before the tokens of the one before it have come back, where nothing in between needs
            the host; None: on GPUs. Tokens are the same either way.
        options: the backend's own, such as ``device``.
    """

    def __init__(
        self,
        model_config: ModelConfig | None,
        engine_buffer: Serialized | Session,
        mapping: Mapping | None = None,
        debug_mode: bool = False,
        debug_tensors_to_save: Sequence[str] | None = None,
        *,
        debug_dir: Path | str | None = None,
        kv_cache: KVCacheConfig | None = None,
        plugins: Plugins | None = None,
        tokenizer: Tokenizer | None = None,
        end_ids: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        look_ahead: bool | None = None,
        **options: Any,
    ) -> None:
        self.plugins = plugins or Plugins.load()
        if not isinstance(engine_buffer, Session):
            engine_buffer = Session.from_serialized_engine(engine_buffer, plugins=self.plugins, **options)
        elif options:
            raise ConfigError(f"the engine is loaded already: {', '.join(sorted(options))} came too late")
        self.session = engine_buffer
        if model_config is not None and model_config != self.config.model:
            raise ConfigError("model_config is not that of the engine; pass None to take the engine's")
        self.mapping = mapping or Mapping()
        if self.mapping.tp_size != self.config.build.tp_size:
            raise ConfigError(
                f"the engine was built for tp_size {self.config.build.tp_size}, the mapping has {self.mapping.tp_size}"
            )
        self.tokenizer = tokenizer
        self.debug_mode = debug_mode
        if debug_mode:
            self.session.start_debug(DebugBuffers(debug_tensors_to_save, debug_dir, self.mapping.rank))
        elif debug_tensors_to_save is not None or debug_dir is not None:
            raise ConfigError("debug_tensors_to_save and debug_dir need debug_mode")
        self.kv_config = kv_cache or KVCacheConfig()
        self.loop = make_loop(
            self.session, self.plugins, self.kv_config, tokenizer, end_ids, debug_mode, clock, look_ahead
        )
        self.lora = LoraManager(self.session, self.plugins, TensorParallel(self.mapping.tp_rank, self.mapping.tp_size))
        self._batch = StaticBatch(self.loop, self.lora)
        self._shape: BatchShape | None = None
        self._window: tuple[int | None, int | None] = (None, None)
        self._cache_config = self.kv_config
        self._closed = False
        self.plugins.on_session_start(self._stats())

    # -- the classic calls ---------------------------------------------------------------------------------------

    def setup(
        self,
        batch_size: int,
        max_context_length: int,
        max_new_tokens: int,
        beam_width: int = 1,
        max_attention_window_size: int | None = None,
        sink_token_length: int | None = None,
    ) -> None:
        """Say what the next ``decode`` will be at most, and have it checked against the engine.

        Raises:
            CapacityError: the engine was not built for that much.
            ConfigError: a window or sinks, which the session's cache does not offer.
        """
        shape = BatchShape(batch_size, max_context_length, max_new_tokens, beam_width)
        shape.check(self.config.build)
        self._window = max_attention_window_size, sink_token_length
        self._fit_cache(self._window)
        self._shape = shape

    def decode(
        self,
        input_ids: torch.Tensor,
        context_lengths: torch.Tensor,
        sampling_config: SamplingConfig | Sequence[SamplingConfig],
        stop_words_list: Sequence[Sequence[int]] | None = None,
        bad_words_list: Sequence[Sequence[int]] | None = None,
        no_repeat_ngram_size: int | None = None,
        streaming: bool = False,
        output_sequence_lengths: bool = False,
        return_dict: bool = False,
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        full: bool = False,
        *,
        prompt_embedding_table: torch.Tensor | None = None,
        tasks: Sequence[int] | torch.Tensor | None = None,
        prompt_vocab_size: int | torch.Tensor | None = None,
        lora_uids: Sequence[str | None] | None = None,
    ) -> Any:
        """Generate for a batch, after ``setup``.

        Args:
            input_ids: integers, padded ``[batch, max_context_length]`` on the right, or packed ``[tokens]``.
            context_lengths: integers ``[batch]``.
            sampling_config: one for all, or one for each.
            stop_words_list, bad_words_list, no_repeat_ngram_size: replace those of ``sampling_config``; one value for
                all, or a vector with one for each.
            streaming: return an iterator; see ``decode_stream``.
            full: with ``streaming``, the whole result after each step, as the classic runtime gave it: the tensor, or
                with ``return_dict`` a dictionary with ``output_ids`` and the lengths and log-probabilities that were
                asked for, of what there is so far. An error is raised once all sequences have ended.
            prompt_embedding_table, tasks, prompt_vocab_size: a prompt table ``[num_tasks, task_vocab, hidden_size]``,
                or its rows ``[num_tasks * task_vocab, hidden_size]`` with ``task_vocab``; and each prompt's task.
            lora_uids: of each prompt, the adapter; None and ``"-1"`` are none.

        Returns:
            int32 ``[batch, sequences, max_seq_len]`` of prompt and generated tokens (as many sequences as a request
            returns, best first), or with ``return_dict`` a dictionary with ``output_ids``, ``sequence_lengths`` and
            ``cum_log_probs`` ``[batch, sequences]``, ``log_probs`` as the ids, each where it was asked for, and
            ``context_logits`` and ``generation_logits`` where the engine gathers them, and
            ``finish_reasons`` and ``outputs`` (a ``GenerationOutput``) with one entry a sequence, request by request.
            With ``streaming`` an iterator over ``Delta``, whether or not ``return_dict`` is set, unless ``full`` says
            otherwise.

        Raises:
            ConfigError: ``setup`` was not called, or for less than this; or something was asked for that the result
                has no place for.
            PluginError: without ``return_dict``, what a plugin raised, after all sequences have ended. With it, it is
                in the sequence's ``GenerationOutput``.
        """
        changes: dict[str, Any] = {
            "stop_words_list": stop_words_list,
            "bad_words_list": bad_words_list,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "output_sequence_lengths": output_sequence_lengths or None,
            "return_dict": return_dict or None,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        prompts = unpack(input_ids, context_lengths)
        sampling = with_fields(sampling_config, len(prompts), changes)
        if self._shape is None:
            raise ConfigError("call setup(batch_size, max_context_length, max_new_tokens) before decode")
        self._shape.check_batch(prompts, [sampling] if isinstance(sampling, SamplingConfig) else sampling)
        table = None if prompt_embedding_table is None else by_task(prompt_embedding_table, prompt_vocab_size)
        return self.decode_batch(
            prompts,
            sampling,
            streaming,
            stopping_criteria,
            logits_processor,
            full=full,
            prompt_table=table,
            prompt_tasks=tasks,
            lora_uids=lora_uids,
        )

    def decode_batch(
        self,
        input_ids: Sequence[torch.Tensor] | Sequence[Sequence[int]],
        sampling_config: SamplingConfig | Sequence[SamplingConfig],
        streaming: bool = False,
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        *,
        full: bool = False,
        text: bool = False,
        prompt_table: Table | Sequence[Table | None] | None = None,
        prompt_tasks: str | Sequence[int] | torch.Tensor | None = None,
        lora_uids: Sequence[str | None] | None = None,
    ) -> Any:
        """Generate for a list of prompts, with one SamplingConfig for all or one for each. Returns as ``decode``.

        ``prompt_table``, ``prompt_tasks`` and ``lora_uids`` are as for ``ModelRunner.generate``.
        """
        requests = make_requests(
            self,
            self.lora,
            input_ids,
            sampling_config,
            logits_processor,
            stopping_criteria,
            text,
            prompt_table,
            prompt_tasks,
            lora_uids,
            deltas=streaming and not full,
            streaming=streaming,
        )
        windows = {(one.sampling.max_attention_window_size, one.sampling.sink_token_length) for one in requests}
        if len(windows) > 1:
            raise ConfigError("requests of one batch share one cache, and need one max_attention_window_size and sinks")
        asked = windows.pop() if windows else (None, None)
        self._fit_cache(self._window if asked == (None, None) else asked)
        if not streaming:
            return self.decode_regular(requests)
        return self._stream_full(requests) if full else self.decode_stream(requests)

    def decode_regular(self, requests: Sequence[Request]) -> Any:
        """Run requests to their ends. Returns as ``decode``."""
        if not any(request.sampling.return_dict for request in requests):
            check_ids_suffice(requests)
        started: dict[str, LiveRequest] = {}
        for _ in self._batch.run(requests, started):
            pass
        outputs = [outputs_of(started[request.request_id]) for request in requests]
        if not any(request.sampling.return_dict for request in requests):
            for output in (one for row in outputs for one in row):
                if output.error is not None:
                    raise output.error
        return batch_result(requests, outputs, self.loop.branches.end_ids)

    def decode_stream(self, requests: Sequence[Request]) -> Iterator[Delta]:
        """Run requests and yield what each step adds to each; ``request_id`` is the index in the batch."""
        with closing(self._batch.run(requests, {})) as steps:
            for deltas in steps:
                yield from deltas

    # -- the batch -----------------------------------------------------------------------------------------------

    def explain(self, sampling_config: SamplingConfig) -> Plan:
        """The plan that a request with this config would have."""
        return self.loop.branches.planner.plan(sampling_config)

    def lend(self, user: str) -> None:
        """Nobody else generates on this session until ``take_back``. ``user`` is what others are told.

        Raises:
            ConfigError: somebody does already.
        """
        self._batch.check_idle()
        self._batch.user = user

    def take_back(self) -> None:
        """The session may be used again by all."""
        self._batch.user = None

    def dump_debug_buffers(self, step: int, folder: Path | str | None = None) -> list[Path]:
        """Write the tensors of the engine's last run; see ``Session.dump_debug_buffers``.

        Raises:
            ConfigError: the session is not in debug mode.
        """
        return self.session.dump_debug_buffers(step, folder)

    def close(self) -> None:
        """Tell the observers that the session is over, once."""
        if not self._closed:
            self._closed = True
            self.plugins.on_session_end(self._stats())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fit_cache(self, window: tuple[int | None, int | None]) -> None:
        """Make the cache anew where this window and these sinks are not what it has."""
        engine = self.session.engine
        config = with_window(self.kv_config, *window, engine, self.plugins)
        if config != self._cache_config:
            self._batch.check_idle()
            self.loop.use(make_cache(config, engine, self.plugins, self.loop.branches.slots.tokens))
            self.loop.branches.planner.follow(self.loop.cache.plan.rewindable)
            self._cache_config = config

    def _stream_full(self, requests: Sequence[Request]) -> Iterator[Any]:
        """The whole result, as it stands, after each step that added something."""
        widths = [self.loop.branches.plan(request).branching.returns for request in requests]
        started: dict[str, LiveRequest] = {}
        with closing(self._batch.run(requests, started)) as steps:
            yield from partial_results(requests, widths, self.loop.branches.end_ids, steps, started)

    def _stats(self) -> SessionStats:
        return SessionStats(
            self.config.family.name,
            self.config.backend.name,
            self.config.build.max_batch_size,
            self.loop.cache.plan.num_blocks,
            self.loop.cache.bytes,
            self.session.context_mem_size,
        )
