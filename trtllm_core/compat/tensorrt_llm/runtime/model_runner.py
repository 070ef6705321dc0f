"""The classic ``ModelRunner``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from trtllm_core.checkpoint import Tokenizer
from trtllm_core.compat.tensorrt_llm._utils import mpi_world_size
from trtllm_core.compat.tensorrt_llm.builder import Engine
from trtllm_core.compat.tensorrt_llm.gone import refuse
from trtllm_core.compat.tensorrt_llm.runtime.generation import GenerationSession, SamplingConfig, copied
from trtllm_core.compat.tensorrt_llm.runtime.loading import load_options
from trtllm_core.compat.tensorrt_llm.runtime.session import Session
from trtllm_core.config import Mapping
from trtllm_core.engine.directory import TOKENIZER
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin import Plugins
from trtllm_core.properties import EngineProperties


class ModelRunner(EngineProperties):
    """Generates for lists of prompts. Make one with ``from_dir``."""

    session: GenerationSession  # type: ignore[assignment]
    """As in the classic class; it has all that is asked of an engine's session."""

    def __init__(
        self,
        session: GenerationSession,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_beam_width: int,
        lora_manager: Any = None,
    ) -> None:
        refuse("ModelRunner", lora_manager=None if lora_manager is session.core.lora else lora_manager)
        self.session = session
        self.generation = session.core
        self.mapping = session.mapping
        self.max_batch_size = max_batch_size
        self.max_input_len = max_input_len
        self.max_seq_len = max_seq_len
        self.max_beam_width = max_beam_width

    @classmethod
    def from_dir(
        cls,
        engine_dir: str | os.PathLike[str],
        lora_dir: Any = None,
        rank: int = 0,
        debug_mode: bool = False,
        lora_ckpt_source: str = "hf",
        medusa_choices: Any = None,
        stream: Any = None,
        **core: Any,
    ) -> Self:
        """Load a rank of an engine directory that ``trtllm-core build`` made, on the GPU where there is one.

        Raises:
            EngineError: (a ``RuntimeError``) it cannot be loaded here; the message says why.
            ConfigError: as many ranks as the engine has were not started, or an argument that is not honoured.
        """
        return cls.from_engine(
            Engine.from_dir(engine_dir, rank),
            lora_dir,
            rank,
            debug_mode,
            lora_ckpt_source,
            medusa_choices,
            stream,
            **core,
        )

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        lora_dir: Any = None,
        rank: int = 0,
        debug_mode: bool = False,
        lora_ckpt_source: str = "hf",
        medusa_choices: Any = None,
        stream: Any = None,
        **core: Any,
    ) -> Self:
        """As ``from_dir``, of an ``Engine``. ``core`` are arguments of trtllm-core's GenerationSession."""
        refuse(f"{cls.__name__}.from_dir", medusa_choices=medusa_choices)
        build = engine.config.build
        if build.tp_size > 1 and mpi_world_size() != build.tp_size:
            raise ConfigError(
                f"the engine was built for {build.tp_size} ranks, but {mpi_world_size()} were started: start as many"
            )
        mapping = Mapping(world_size=build.tp_size, rank=rank, tp_size=build.tp_size)
        plugins = core.pop("plugins", None) or Plugins.load()
        session = Session.from_directory(
            engine.directory, rank, plugins=plugins, **load_options(engine.config, mapping)
        )
        has_tokenizer = (engine.directory / TOKENIZER).is_file()
        generation = GenerationSession(
            None,
            session,
            mapping,
            debug_mode,
            stream=stream,
            plugins=plugins,
            tokenizer=Tokenizer.from_dir(engine.directory) if has_tokenizer else None,
            **core,
        )
        generation.core.lora.load_from_ckpt(lora_dir, lora_ckpt_source)
        runner = cls(generation, build.max_batch_size, build.max_input_len, build.max_seq_len, build.max_beam_width)
        runner._file = engine.engine
        return runner

    _file: Path | None = None

    def serialize_engine(self) -> bytes:
        """The rank's file."""
        if self._file is None:
            raise ConfigError("serialize_engine: this runner was not made by from_dir or from_engine")
        return self._file.read_bytes()

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
        **kwargs: Any,
    ) -> Any:
        """Generate for each prompt.

        Args:
            batch_input_ids: one-dimensional integer tensors.
            sampling_config: left as it is; None takes the defaults.
            prompt_table, prompt_tasks, lora_uids: as for trtllm-core's ``ModelRunner.generate``.
            streaming: return an iterator over the whole result as it stands after each step.
            stopping_criteria, logits_processor: classic callbacks, or plugins of ours.
            kwargs: fields of SamplingConfig, such as ``end_id`` and ``max_new_tokens``.

        Returns:
            int32 ``[batch, beams, length]``, or a dictionary with ``return_dict``.

        Raises:
            CapacityError: (a ``RuntimeError``) more than the runner was made for.
            ConfigError: a field that there is not, or a value that nothing honours.
            PluginError: what a callback raised.
        """
        refuse(
            f"{type(self).__name__}.generate",
            medusa_choices=medusa_choices,
        )
        config = SamplingConfig(None, None) if sampling_config is None else copied(sampling_config)
        unknown = config.update(**kwargs)
        if unknown:
            raise ConfigError(f"generate() has no argument {_suggested(unknown, vars(config))}")
        prompts = [ids.reshape(-1).tolist() if isinstance(ids, torch.Tensor) else list(ids) for ids in batch_input_ids]
        self._check_inputs(prompts, config)
        return self.session.generate(
            prompts,
            config,
            streaming,
            stopping_criteria,
            logits_processor,
            prompt_table=prompt_table,
            prompt_tasks=prompt_tasks,
            lora_uids=lora_uids,
        )

    def _check_inputs(self, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
        if not prompts:
            raise ConfigError("there is no prompt to generate from")
        longest = max(map(len, prompts))
        for name, asked, most in (
            ("batch size", len(prompts), self.max_batch_size),
            ("input length", longest, self.max_input_len),
            ("input length + max_new_tokens", longest + config.max_new_tokens, self.max_seq_len),
            ("num_beams", config.num_beams, self.max_beam_width),
        ):
            if asked > most:
                raise CapacityError(f"{name} {asked} is more than the {most} that the engine or the runner allows")


def _suggested(unknown: dict[str, Any], known: dict[str, Any]) -> str:
    """Names that there are not, each with the nearest that there is."""
    parts = []
    for name in sorted(unknown):
        near = difflib.get_close_matches(name, known, n=1)
        parts.append(f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name))
    return ", ".join(parts)
