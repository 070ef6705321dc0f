"""The classic properties of sessions and runners, and the checks that they share: all read off an engine's config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trtllm_core.config import EngineConfig, SamplingConfig
from trtllm_core.config.quant_mode import QuantMode, quant_mode
from trtllm_core.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from trtllm_core.config import Mapping
    from trtllm_core.prompt_table import VirtualTokens
    from trtllm_core.session import Session


class EngineProperties:
    """Head and layer counts are this rank's, as they were in the classic runtime."""

    session: Session
    mapping: Mapping

    @property
    def config(self) -> EngineConfig:
        """What the engine was built from and for."""
        return self.session.config

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self.session.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return getattr(torch, self.config.model.dtype)  # type: ignore[no-any-return]

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return self.config.model.vocab_size

    @property
    def vocab_size_padded(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size_padded

    @property
    def num_layers(self) -> int:
        """Layers of this rank's pipeline stage."""
        return len(self.mapping.pp_layers(self.config.model.num_layers))

    @property
    def first_layer(self) -> int:
        """Number of this stage's first layer."""
        return self.mapping.pp_layers(self.config.model.num_layers)[0]

    @property
    def last_layer(self) -> int:
        """One past the number of this stage's last layer."""
        return self.first_layer + self.num_layers

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return self.config.model.num_heads // self.mapping.tp_size

    @property
    def num_heads_kv(self) -> int:
        """Key/value heads of this rank."""
        return -(-self.config.model.num_kv_heads // self.mapping.tp_size)

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.config.model.head_size

    @property
    def hidden_size(self) -> int:
        """Hidden size of this rank: the whole model's over the tensor-parallel size."""
        return self.config.model.hidden_size // self.mapping.tp_size

    @property
    def tokens_per_block(self) -> int:
        """Tokens of a KV block."""
        return self.config.build.tokens_per_block

    @property
    def paged_kv_cache(self) -> bool:
        """Whether the cache is paged."""
        return self.config.contract == "packed_paged"

    @property
    def remove_input_padding(self) -> bool:
        """Whether the engine takes packed input."""
        return self.config.contract == "packed_paged"

    @property
    def max_sequence_length(self) -> int:
        """Prompt and generated tokens together."""
        return self.config.build.max_seq_len

    @property
    def context_mem_size(self) -> int:
        """Bytes of weights on this rank."""
        return self.session.context_mem_size

    @property
    def gather_context_logits(self) -> bool:
        """Whether results carry the logits of every prompt token."""
        return self.config.build.gather_context_logits

    @property
    def gather_generation_logits(self) -> bool:
        """Whether results carry the logits that tokens were chosen from."""
        return self.config.build.gather_generation_logits

    @property
    def use_lora_plugin(self) -> bool:
        """Whether the engine takes LoRA adapters."""
        return self.config.build.max_lora_rank > 0

    @property
    def max_prompt_embedding_table_size(self) -> int:
        """Rows that a prompt table may have, over all its tasks; 0: the engine takes none."""
        return self.config.build.max_prompt_embedding_table_size

    # What engines of this version never have; the classic names stay, so that scripts can ask.
    use_gpt_attention_plugin = True
    use_mamba_conv1d_plugin = False
    use_custom_all_reduce = False
    use_context_fmha_for_generation = False
    cross_attention = False
    has_position_embedding = False
    has_token_type_embedding = False
    is_medusa_mode = False
    num_medusa_heads = 0
    max_medusa_tokens = 0
    paged_state = False
    conv_kernel = 0
    rnn_hidden_size = 0

    @property
    def quant_mode(self) -> QuantMode:
        """What is quantised; 0: nothing is."""
        return quant_mode(self.config)

    def check_prompt(
        self, prompt: Sequence[int], sampling: SamplingConfig, name: str, virtual: VirtualTokens | None = None
    ) -> None:
        """Refuse a prompt that the engine cannot run. ``virtual``: what ids beyond the vocabulary stand for.

        Raises:
            ConfigError: it is empty, or has token ids outside the vocabulary and the table.
            CapacityError: it is longer than the engine was built for, alone or with what it asks for.
        """
        build, vocab = self.config.build, self.vocab_size
        if not prompt:
            raise ConfigError(f"{name} is empty: there must be at least one token")
        if virtual is not None:
            virtual.check(prompt, name)
        wrong = [token for token in (min(prompt), max(prompt)) if token < 0 or (virtual is None and token >= vocab)]
        if wrong:
            raise ConfigError(f"{name} has token id {wrong[0]}, outside the vocabulary of {vocab}")
        if len(prompt) > build.max_input_len:
            raise CapacityError(f"{name} has {len(prompt)} tokens; the engine takes at most {build.max_input_len}")
        if len(prompt) + sampling.max_new_tokens > build.max_seq_len:
            raise CapacityError(
                f"{name} has {len(prompt)} tokens and asks for {sampling.max_new_tokens} new ones; the engine was "
                f"built for {build.max_seq_len} together"
            )
