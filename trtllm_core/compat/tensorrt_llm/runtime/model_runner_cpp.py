"""The classic ``ModelRunnerCpp``: the same runner, with the arguments of the C++ executor's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch

from trtllm_core.compat.classic import LogitsPostProcessors
from trtllm_core.compat.tensorrt_llm.gone import refuse
from trtllm_core.compat.tensorrt_llm.runtime.generation import SamplingConfig, copied
from trtllm_core.compat.tensorrt_llm.runtime.model_runner import ModelRunner
from trtllm_core.config import KVCacheConfig
from trtllm_core.errors import CapacityError, ConfigError

HINTS = frozenset(
    {
        "kv_cache_free_gpu_memory_fraction",
        "cross_kv_cache_fraction",
        "gpu_weights_percent",
        "enable_chunked_context",
        "multi_block_mode",
        "enable_context_fmha_fp32_acc",
        "cuda_graph_mode",
    }
)
"""Arguments of ``from_dir`` about how fast, or with how much memory, the same tokens come. They have no effect."""


class ModelRunnerCpp(ModelRunner):
    """Streaming, callbacks and stopping criteria work as in ``ModelRunner``; the executor refused the last."""

    _post_processors: Mapping[str, Callable[..., None]] = {}
    _window: Any = None
    _sinks: int | None = None

    @classmethod
    def from_dir(  # type: ignore[override]
        cls,
        engine_dir: str | os.PathLike[str],
        *,
        lora_dir: Any = None,
        rank: int = 0,
        max_batch_size: int | None = None,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
        max_beam_width: int | None = None,
        max_attention_window_size: Sequence[int] | None = None,
        sink_token_length: int | None = None,
        max_tokens_in_paged_kv_cache: int | None = None,
        kv_cache_enable_block_reuse: bool = False,
        logits_processor_map: Mapping[str, Callable[..., None]] | None = None,
        gather_generation_logits: bool = False,
        debug_mode: bool = False,
        **rest: Any,
    ) -> Self:
        """As ``ModelRunner.from_dir``.

        Args:
            max_batch_size, max_input_len, max_output_len, max_beam_width: limits below the engine's.
            max_attention_window_size, sink_token_length: of requests that set none themselves.
            max_tokens_in_paged_kv_cache: room in the KV cache.
            kv_cache_enable_block_reuse: take the policy ``prefix``, under which prompts reuse what others computed.
            logits_processor_map: functions that requests choose by name.
            gather_generation_logits: results have them if the engine was built so; else this is refused.
            rest: ``HINTS``, and what must be left at its default.

        Raises:
            CapacityError: a limit above the engine's.
        """
        asked = {name: value for name, value in rest.items() if name not in HINTS}
        refuse(f"{cls.__name__}.from_dir", **asked)
        policy = "prefix" if kv_cache_enable_block_reuse else "paged"
        cache = KVCacheConfig(policy=policy, max_tokens=max_tokens_in_paged_kv_cache)
        runner = super().from_dir(engine_dir, lora_dir, rank, debug_mode, kv_cache=cache)
        if gather_generation_logits and not runner.gather_generation_logits:
            raise ConfigError("gather_generation_logits: the engine was not built with it")
        given = {"max_batch_size": max_batch_size, "max_input_len": max_input_len, "max_beam_width": max_beam_width}
        for name, value in given.items():
            runner._lower(name, value)
        if max_output_len is not None:
            runner._lower("max_seq_len", min(runner.max_input_len + max_output_len, runner.max_seq_len))
        runner._post_processors = logits_processor_map or {}
        runner._window, runner._sinks = max_attention_window_size, sink_token_length
        return runner

    def generate(
        self,
        batch_input_ids: Sequence[torch.Tensor],
        sampling_config: SamplingConfig | None = None,
        prompt_table: Any = None,
        prompt_tasks: str | None = None,
        lora_uids: Sequence[str] | None = None,
        streaming: bool = False,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        medusa_choices: Any = None,
        *,
        logits_processor_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``ModelRunner.generate``, with the executor's defaults: one new token, ``top_k`` 0, ``length_penalty`` 0.

        Args:
            logits_processor_names: for each request, a name of ``logits_processor_map`` or None.
            kwargs: fields of SamplingConfig; what else the executor took must be left at its default.
        """
        if sampling_config is None:
            config = SamplingConfig(None, None, max_new_tokens=1, top_k=0, length_penalty=0.0)
        else:
            config = copied(sampling_config)
        rest = config.update(**kwargs)
        refuse(f"{type(self).__name__}.generate", **rest)
        if config.max_attention_window_size is None and self._window:
            config.max_attention_window_size = self._windows()
        if config.sink_token_length is None:
            config.sink_token_length = self._sinks
        given = logits_processor if type(logits_processor) in (list, tuple) else [logits_processor]
        processors = [each for each in given if each is not None]
        if logits_processor_names is not None:
            if len(logits_processor_names) != len(batch_input_ids):
                raise ConfigError(
                    f"logits_processor_names has {len(logits_processor_names)} entries, but there are "
                    f"{len(batch_input_ids)} prompts"
                )
            processors.append(LogitsPostProcessors(self._post_processors, logits_processor_names))
        return super().generate(
            batch_input_ids,
            config,
            prompt_table,
            prompt_tasks,
            lora_uids,
            streaming,
            stopping_criteria,
            processors or None,
            medusa_choices,
        )

    def _windows(self) -> Any:
        """A list of windows repeats over the layers."""
        sizes = self._window if isinstance(self._window, (list, tuple)) else [self._window]
        return [sizes[layer % len(sizes)] for layer in range(self.num_layers)]

    def _lower(self, name: str, value: int | None) -> None:
        if value is None:
            return
        if value > getattr(self, name):
            raise CapacityError(f"{name} {value} is more than the {getattr(self, name)} that the engine was built for")
        setattr(self, name, value)
