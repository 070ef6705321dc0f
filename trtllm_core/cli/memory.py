"""How much memory an engine takes, computed from its config before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.config import EngineConfig
    from trtllm_core.plugin import ModelFamily

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank, the fullest one."""

    weights: int
    weights_all_ranks: int
    kv_per_token: int
    kv_per_sequence: int
    """One sequence of max_seq_len, in whole blocks."""
    kv_at_limits: int
    """max_batch_size of those: what the KV pool takes unless it is told otherwise."""
    logits: int
    """Logits of a step, raw and processed."""
    lora: int = 0
    """Adapters at the engine's limits, of layers that are all changed."""

    @property
    def total(self) -> int:
        """Weights, KV pool, logits and adapters; activations come on top."""
        return self.weights + self.kv_at_limits + self.logits + self.lora

    def sequences_in(self, memory: int) -> int:
        """Sequences of max_seq_len that fit beside the rest."""
        return max(memory - self.weights - self.logits - self.lora, 0) // self.kv_per_sequence

    def as_json(self, memory: int | None = None) -> dict[str, Any]:
        """All of it, for ``--json``."""
        fit = {} if memory is None else {"memory": memory, "sequences_that_fit": self.sequences_in(memory)}
        return {**asdict(self), "total": self.total, **fit}


def plan_memory(config: EngineConfig, weights: list[int]) -> MemoryPlan:
    """The plan of an engine whose ranks have ``weights`` bytes of weights."""
    build = config.build
    per_token = config.model.kv_bytes_per_token(config.kv_dtype, build.tp_size)
    per_sequence = -(-build.max_seq_len // build.tokens_per_block) * build.tokens_per_block * per_token
    return MemoryPlan(
        weights=max(weights),
        weights_all_ranks=sum(weights),
        kv_per_token=per_token,
        kv_per_sequence=per_sequence,
        kv_at_limits=build.max_branches * per_sequence,
        logits=(2 * build.max_branches + build.gather_context_logits * build.max_num_tokens)
        * config.vocab_size_padded
        * 4,
        lora=_lora_bytes(config),
    )


def _lora_bytes(config: EngineConfig) -> int:
    """Of one rank, at most: the factors of each layer, as if none were split over the ranks."""
    from trtllm_core.config.model import BYTES

    features = sum(len(layer.rows) * layer.inputs + sum(layer.rows) for layer in config.lora_layers.values())
    rank = -(-config.build.max_lora_rank // 16) * 16  # as LoraBank pads it
    return config.build.max_loras * rank * features * BYTES[config.model.dtype]


def weight_bytes(config: EngineConfig, family: ModelFamily) -> list[int]:
    """Bytes of each rank's weights: the family's module, made without memory."""
    from trtllm_core.backends.modules import meta_module
    from trtllm_core.parallel import TensorParallel

    size = config.build.tp_size
    modules = (meta_module(config, family, TensorParallel(rank, size)) for rank in range(size))
    return [sum(parameter.nbytes for parameter in module.parameters()) for module in modules]


def parse_size(text: str) -> int:
    """Bytes from ``24GiB``, ``24G`` or ``512MB``. All units are powers of 1024, as memory is sold.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if match is None:
        raise ConfigError(f"--memory {text}: write a size such as 24GiB or 512MiB")
    return int(float(match[1]) * 1024 ** _POWERS[match[2]])
