"""Base classes of execution backends: what turns weights into an engine and an engine into logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trtllm_core.errors import BackendError
from trtllm_core.plugin.inspection import Finding, Inspection

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from trtllm_core.config import EngineConfig
    from trtllm_core.plugin.family import ModelFamily
    from trtllm_core.plugin.kv_policy import Edits, KVPlan

T = TypeVar("T")


Progress = Callable[[str, int, int], None]
"""``(what, done, total)``."""


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can work here."""

    available: bool
    reason: str
    """What was found, or what is missing and how to install it."""
    version: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an executable can do. A plan that needs more is refused before its first token."""

    contract: str
    """``packed_paged`` or ``padded_linear``."""
    dtypes: tuple[str, ...]
    multi_position: bool = False
    """Several positions of a row in one call: chunks, verification."""
    tree_masks: bool = False
    cuda_graphs: bool = False
    hidden_states: bool = False
    """It gives final hidden states of any tokens that it runs: the input ``hidden_indices`` and the output
    ``hidden_states``."""
    batch_invariant: bool = False
    """A row's logits do not depend on what else is in the batch, bit for bit."""
    kv: frozenset[str] = frozenset()
    """What its KV cache can do beyond blocks and copies: ``window`` (rings with sinks), ``positions`` (positions within
    the cache), ``moves`` (entries move and are dropped), ``attention_scores``, ``host`` (blocks are saved to the host's
    memory and loaded back)."""
    attention_window: int | None = None
    """Tokens that any layer of this engine sees at most, itself included; None: some layer sees all."""
    lora: bool = False
    """It takes adapters: ``put_adapter``, and the input ``lora_ids``."""
    prompt_tables: bool = False
    """It takes embeddings in place of tokens: the inputs ``virtual_tokens`` and ``virtual_embeddings``."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named input or output of an executable."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """Numbers are fixed; names such as ``tokens`` are symbols that must agree between tensors of one call."""
    is_input: bool = True
    minimum: tuple[int, ...] = ()
    maximum: tuple[int, ...] = ()
    optional: bool = False
    """An input or output that a call may leave out."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to some output features of one linear layer of a rank: ``b @ a @ x``."""

    a: torch.Tensor
    """``[r, in]``: the rank's input features."""
    b: torch.Tensor
    """``[out, r]``, scaled."""
    start: int
    """The layer's output feature to which the first row of ``b`` is added."""


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """What a backend has written for one rank."""

    path: Path
    """The rank's engine."""
    companions: tuple[Path, ...] = ()
    """Files beside it without which it does not run, such as its weights."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What ``config.json`` should say of this build: versions, targets, measured errors. Plain JSON."""


class Executable(ABC):
    """An engine loaded on one rank."""

    config: EngineConfig
    capabilities: Capabilities
    device: torch.device
    tensors: tuple[TensorSpec, ...]
    own_threads: bool = False
    """Whether it computes on the host, and not on PyTorch's threads: see ``trtllm_core.host_threads``."""
    debugging: bool = False
    """Set by a session in debug mode: runs keep what ``debug_tensors`` gives, and are not replayed from graphs."""

    @abstractmethod
    def allocate_kv(self, plan: KVPlan) -> int:
        """Allocate the KV cache that the plan describes, instead of any before it. Returns its bytes."""

    @abstractmethod
    def edit_kv(self, edits: Edits) -> None:
        """Run the policy's saves, copies and loads of blocks before the next ``execute``. Moves come to ``move_kv``."""

    def move_kv(self, source: np.ndarray, target: np.ndarray, layer: np.ndarray) -> None:
        """Move entries of the pool, all at the same time, before the next ``execute``.

        All are int64 ``[n]``; an entry is ``block * tokens_per_block + i``, and layer -1 means all layers.

        Raises:
            BackendError: ``capabilities.kv`` names no ``moves``.
        """
        raise BackendError(f"backend {self.config.backend.name!r} does not move entries of its KV cache")

    def attention_scores(self) -> Sequence[np.ndarray]:
        """Of each row of the last ``execute``, in a cache whose plan has ``scores``: see ``KVStatistics.attention``.

        Raises:
            BackendError: ``capabilities.kv`` names no ``attention_scores``.
        """
        raise BackendError(f"backend {self.config.backend.name!r} does not keep attention scores")

    @abstractmethod
    def execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """Run once. ``stream`` is a raw CUDA stream, 0 on the CPU. Asynchronous where the device is.

        Raises:
            BackendError: it could not run.
        """

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights on this rank."""

    def debug_tensors(self) -> Mapping[str, torch.Tensor]:
        """While ``debugging``, of the last run what lies between inputs and outputs, by name; until the next run."""
        return {}

    def put_adapter(self, index: int, adapter: Mapping[str, Sequence[LowRank]]) -> None:
        """Keep an adapter for rows whose ``lora_ids`` say ``index``, instead of any before it; an empty one drops it.

        Called between runs. ``adapter`` is by layer: names of the family's module, such as ``layers.0.mlp.down``.

        Raises:
            BackendError: this backend takes no adapters.
        """
        raise BackendError(f"backend {self.config.backend.name!r} takes no LoRA adapters")

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value`` on every rank of the engine, which all call it alike. An engine of one rank: itself."""
        return value


class Backend(ABC):
    """Builds and loads engines."""

    name: str
    contract: Literal["packed_paged", "padded_linear"]
    """The tensors that its engines take."""
    takes: frozenset[str] = frozenset()
    """What they take besides, of ``lora``, ``prompt_tables``, ``quantization`` and, of quantised weights,
    ``zero_points``, ``offsets``, ``float8`` (see ``trtllm_core.config.quantization``) and ``tables``, embeddings that
    are the head (``byte_tables``: those of symmetric codes of 8 bits alone).
    A build that asks for what is not here is refused."""
    gives: frozenset[str] = frozenset()
    """What its engines give to plugins, of ``multi_position`` and ``hidden_states`` (see ``Capabilities``).

    ``explain``, which loads no engine, goes by it; a session goes by what the engine says."""

    @abstractmethod
    def probe(self) -> Availability:
        """Whether the backend can work here. Never raises, imports nothing heavy."""

    @abstractmethod
    def build(
        self,
        config: EngineConfig,
        family: ModelFamily,
        weights: Iterable[tuple[str, torch.Tensor]],
        directory: Path,
        rank: int,
        progress: Progress,
    ) -> BuiltRank:
        """Write ``rank{rank}.*`` into ``directory``, and say what was written.

        ``progress(what, done, total)`` may be told of long parts; the weights are counted as they are used up.

        ``weights`` gives the parameters of the family's module for this rank, in the order of its
        ``named_parameters()``, each made when it is reached: use it up without keeping them.
        """

    @abstractmethod
    def load(
        self, source: Path | bytes | memoryview, config: EngineConfig, family: ModelFamily, **options: Any
    ) -> Executable:
        """Load one rank's engine. ``options`` are the backend's own: ``device``, ``tensor_parallel``, …"""

    def config_of(self, source: Path | bytes | memoryview) -> EngineConfig | None:
        """The ``EngineConfig`` that a serialised engine carries in itself, if it carries one."""
        return None

    def inspect(self, path: Path, config: EngineConfig, family: ModelFamily) -> Inspection:
        """What one rank's engine is made of, read from its files: nothing is run, and no GPU is needed.

        Args:
            path: of the rank's file, in its engine directory.
            config: of the engine.
            family: of its model.

        Raises:
            EngineCorruptError: the files cannot be read.
        """
        return Inspection(f"the backend {self.name!r} tells nothing of its engines' insides")

    def diagnose(self, path: Path, config: EngineConfig) -> Sequence[Finding]:
        """What could keep one rank's engine from running here, for ``trtllm-core doctor``. Never raises.

        Sizes of files, plugins and memory have been looked at before.
        """
        return ()


def input_specs(specs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """The inputs among ``specs``, by name."""
    return {spec.name: spec for spec in specs if spec.is_input}
