"""What a user hands over for a batch, as requests: tensors and lists become tokens, everything is checked first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.request import Request
from trtllm_core.errors import ConfigError
from trtllm_core.lora import Adapter, LoraManager
from trtllm_core.plugin import LogitsProcessor, StoppingCriterion
from trtllm_core.prompt_table import Table, virtual_tokens
from trtllm_core.properties import EngineProperties


def make_requests(
    engine: EngineProperties,
    lora: LoraManager,
    prompts: Sequence[Any],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    processors: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
    text: bool = False,
    prompt_table: Table | Sequence[Table | None] | None = None,
    prompt_tasks: str | Sequence[int] | torch.Tensor | None = None,
    lora_uids: Sequence[str | None] | None = None,
    deltas: bool = False,
    ids: Sequence[str] | None = None,
    streaming: bool = True,
) -> list[Request]:
    """One request for each prompt. Arguments are those of ``ModelRunner.generate``.

    ``deltas``: there is a place for logits in what comes back, whether or not ``return_dict`` is set. ``ids``: of the
    requests; None: their index. ``streaming``: somebody wants to know of each step.

    Raises:
        ConfigError, CapacityError: something cannot work on this engine, or their numbers differ.
    """
    batch = len(prompts)
    configs = [sampling] * batch if isinstance(sampling, SamplingConfig) else list(sampling)
    if len(configs) != batch:
        raise ConfigError(f"{batch} prompts need one SamplingConfig or {batch}, not {len(configs)}")
    tables = virtual_tokens(prompt_table, prompt_tasks, batch, engine.config, engine.device)
    adapters = _adapters(lora, lora_uids, batch)
    objects = _several(processors, LogitsProcessor), _several(criteria, StoppingCriterion)
    requests = []
    for i, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        tokens = prompt.reshape(-1).tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
        engine.check_prompt(tokens, config, f"prompt {i}" if ids is None else f"request {ids[i]!r}", tables[i])
        room = deltas or config.return_dict
        context = room and engine.gather_context_logits
        generation = room and engine.gather_generation_logits
        requests.append(
            Request(
                str(i) if ids is None else ids[i],
                tuple(tokens),
                config,
                *objects,
                text,
                adapters[i],
                tables[i],
                context,
                generation,
                streaming,
            )
        )
    return requests


def unpack(input_ids: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    """Prompts from a classic tensor: padded ``[batch, longest]`` on the right, or packed ``[tokens]``.

    Raises:
        ConfigError: the lengths are not those of the tensor.
    """
    sizes = lengths.reshape(-1).tolist()
    if input_ids.dim() == 1:
        if input_ids.shape[0] != sum(sizes):
            raise ConfigError(
                f"packed input_ids has {input_ids.shape[0]} tokens; context_lengths add up to {sum(sizes)}"
            )
        return [part.tolist() for part in torch.split(input_ids, sizes)]
    if input_ids.shape[0] != len(sizes) or max(sizes, default=0) > input_ids.shape[1]:
        raise ConfigError(f"input_ids {list(input_ids.shape)} does not fit context_lengths {sizes}")
    return [row[:size].tolist() for row, size in zip(input_ids, sizes, strict=True)]


def _adapters(lora: LoraManager, uids: Sequence[str | None] | None, batch: int) -> list[Adapter | None]:
    if uids is None:
        return [None] * batch
    if isinstance(uids, str) or len(uids) != batch:
        raise ConfigError(f"lora_uids is {uids!r}: {batch} prompts need a list with one uid for each")
    return [lora.find(uid) for uid in uids]


def _several(given: Any, base: type) -> tuple[Any, ...]:
    return () if given is None else (given,) if isinstance(given, base) else tuple(given)
