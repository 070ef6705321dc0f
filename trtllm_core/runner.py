"""``ModelRunner``: an engine directory and its tokenizer, ready to generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from trtllm_core.checkpoint import Tokenizer
from trtllm_core.config import KVCacheConfig, Mapping, SamplingConfig, with_fields
from trtllm_core.decoding.plan import Plan
from trtllm_core.engine.directory import TOKENIZER
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.generation import GenerationSession
from trtllm_core.lora import Directories
from trtllm_core.plugin import Executable, LogitsProcessor, Plugins, StoppingCriterion
from trtllm_core.prompt_table import Table
from trtllm_core.properties import EngineProperties
from trtllm_core.session import Session


class ModelRunner(EngineProperties):
    """Generates from lists of prompts, as the classic ``ModelRunner`` did."""

    def __init__(self, generation: GenerationSession) -> None:
        self.generation = generation
        self.session = generation.session
        self.mapping = generation.mapping

    @classmethod
    def from_dir(
        cls,
        engine_dir: Path | str,
        rank: int = 0,
        debug_mode: bool = False,
        *,
        kv_cache: KVCacheConfig | None = None,
        plugins: Plugins | None = None,
        lora_dir: Directories | None = None,
        lora_ckpt_source: str = "hf",
        look_ahead: bool | None = None,
        **options: Any,
    ) -> ModelRunner:
        """Load an engine directory: its config is checked, then one rank's weights are mapped.

        Args:
            engine_dir: what ``trtllm-core build`` wrote.
            rank: which rank of a tensor-parallel engine this process is.
            debug_mode: see ``GenerationSession``.
            kv_cache: policy and size of the KV cache.
            plugins: where everything is looked up; None loads what is installed.
            lora_dir: a directory of a Hugging Face PEFT adapter, or several. Their uids are "0", "1", … in order.
            lora_ckpt_source: "hf", the only kind of adapters that is read.
            look_ahead: see ``GenerationSession``.
            options: the backend's own, such as ``device="cuda"`` or ``batch_invariant=True``.

        Raises:
            EngineError, PluginNotFoundError: it cannot be loaded here; the message says why and what to do.
            ConfigError, CheckpointError: as ``add_lora``.
        """
        plugins = plugins or Plugins.load()
        session = Session.from_directory(engine_dir, rank, plugins=plugins, **options)
        has_tokenizer = (Path(engine_dir) / TOKENIZER).is_file()
        tokenizer = Tokenizer.from_dir(engine_dir) if has_tokenizer else None
        runner = cls._of(session, rank, debug_mode, kv_cache, plugins, tokenizer, look_ahead)
        runner.generation.lora.load_from_ckpt(lora_dir, lora_ckpt_source)
        return runner

    @classmethod
    def from_engine(
        cls,
        engine: Executable | Session,
        rank: int = 0,
        debug_mode: bool = False,
        *,
        kv_cache: KVCacheConfig | None = None,
        plugins: Plugins | None = None,
        tokenizer: Tokenizer | None = None,
        lora_dir: Directories | None = None,
        lora_ckpt_source: str = "hf",
        look_ahead: bool | None = None,
    ) -> ModelRunner:
        """Use an engine that is loaded already. It has no directory, so its tokenizer is passed in."""
        session = engine if isinstance(engine, Session) else Session.from_engine(engine)
        runner = cls._of(session, rank, debug_mode, kv_cache, plugins or Plugins.load(), tokenizer, look_ahead)
        runner.generation.lora.load_from_ckpt(lora_dir, lora_ckpt_source)
        return runner

    @classmethod
    def _of(
        cls,
        session: Session,
        rank: int,
        debug_mode: bool,
        kv_cache: KVCacheConfig | None,
        plugins: Plugins,
        tokenizer: Tokenizer | None,
        look_ahead: bool | None,
    ) -> ModelRunner:
        size = session.config.build.tp_size
        mapping = Mapping(world_size=size, rank=rank, tp_size=size)
        return cls(
            GenerationSession(
                None,
                session,
                mapping,
                debug_mode,
                kv_cache=kv_cache,
                plugins=plugins,
                tokenizer=tokenizer,
                look_ahead=look_ahead,
            )
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer."""
        return self.generation.tokenizer

    @property
    def max_batch_size(self) -> int:
        """Sequences that run together; more wait for a place."""
        return self.config.build.max_batch_size

    def generate(
        self,
        batch_input_ids: Sequence[torch.Tensor] | Sequence[Sequence[int]],
        sampling_config: SamplingConfig | Sequence[SamplingConfig] | None = None,
        streaming: bool = False,
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        *,
        full: bool = False,
        text: bool = False,
        prompt_table: Table | Sequence[Table | None] | None = None,
        prompt_tasks: str | Sequence[int] | torch.Tensor | None = None,
        lora_uids: Sequence[str | None] | None = None,
        **fields: Any,
    ) -> Any:
        """Generate for each prompt.

        Args:
            batch_input_ids: one-dimensional integer tensors, or lists of token ids.
            sampling_config: one for all, or one for each; None is the default one.
            streaming: return an iterator over ``Delta``; with ``full``, over the whole result after each step.
            stopping_criteria, logits_processor: objects to use beside those that the config names.
            text: deltas and outputs carry text.
            prompt_table: embeddings ``[num_tasks, task_vocab, hidden_size]``, or a ``.npy`` file of them, which stand
                for the token ids ``vocab_size`` to ``vocab_size + task_vocab - 1`` of the prompts. A list has one for
                each prompt, or None.
            prompt_tasks: each prompt's task, such as ``"0,3,1,0"``; None is task 0 for all.
            lora_uids: each prompt's adapter, by the uid that it was loaded under; None and ``"-1"`` are none.
            fields: SamplingConfig fields that replace those of ``sampling_config``: one value for all, or a vector with
                one for each (see ``SamplingConfig.for_batch``).

        Returns:
            As ``GenerationSession.decode``.

        Raises:
            CapacityError: more prompts, longer ones, or more new tokens than the engine was built for.
            ConfigError: token ids outside the vocabulary, an unknown field, or one that nothing honours.
            PluginError: as ``GenerationSession.decode``.
        """
        if not batch_input_ids:
            raise ConfigError("there is no prompt to generate from")
        if len(batch_input_ids) > self.max_batch_size:
            raise CapacityError(
                f"{len(batch_input_ids)} prompts at once; the engine was built for max_batch_size {self.max_batch_size}"
            )
        base = sampling_config if sampling_config is not None else SamplingConfig()
        return self.generation.decode_batch(
            batch_input_ids,
            with_fields(base, len(batch_input_ids), fields),
            streaming,
            stopping_criteria,
            logits_processor,
            full=full,
            text=text,
            prompt_table=prompt_table,
            prompt_tasks=prompt_tasks,
            lora_uids=lora_uids,
        )

    @property
    def lora_uids(self) -> tuple[str, ...]:
        """The adapters that are loaded."""
        return self.generation.lora.uids

    def add_lora(self, uid: str, directory: Path | str) -> None:
        """Load a Hugging Face PEFT adapter; requests that come from now on may name it. Others may run meanwhile.

        Raises:
            ConfigError: the engine was not built for it, or the uid is taken.
            CheckpointError: the adapter cannot be read, asks for what is not supported, or is of another model.
            CapacityError: as many are loaded as the engine was built for.
        """
        self.generation.lora.add(uid, directory)

    def drop_lora(self, uid: str) -> None:
        """Unload an adapter.

        Raises:
            ConfigError: there is none of this uid, or requests that have not ended use it.
        """
        self.generation.lora.drop(uid)

    def explain(self, sampling_config: SamplingConfig) -> Plan:
        """The plan that a request with this config would have, made without running anything."""
        return self.generation.explain(sampling_config)

    def close(self) -> None:
        """Tell the observers that the session is over, once."""
        self.generation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
