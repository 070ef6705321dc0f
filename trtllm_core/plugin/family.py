"""Base class of model families, and how weights of a checkpoint become parameters of a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trtllm_core.config import ModelConfig
    from trtllm_core.parallel import TensorParallel

Transform = Callable[["torch.Tensor"], "torch.Tensor"]


class CheckpointView(Protocol):
    """A checkpoint as a family sees it. Names, shapes and values are the file's own."""

    @property
    def format(self) -> Literal["hf", "gguf"]:
        """Which naming scheme it follows."""
        ...

    @property
    def architecture(self) -> str:
        """``architectures[0]`` of a Hugging Face config, or GGUF's ``general.architecture``."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed ``config.json``, or the GGUF metadata."""
        ...

    def names(self) -> frozenset[str]:
        """All tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in PyTorch's order."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU; float32 where it is stored quantised."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint on its way into a parameter."""

    source: str
    """Name in the checkpoint."""
    shard: Literal["whole", "rows", "columns", "heads", "kv_heads", "vocab"] = "whole"
    """How tensor parallelism splits it: output features (``rows``, axis 0), input features (``columns``, axis 1),
    whole heads of axis 0, key/value heads (repeated where there are fewer than ranks), vocabulary with padding."""
    transform: Transform | None = None
    """Applied to the whole tensor, as the checkpoint has it, before it is split: a transposition, a permutation, a
    part of a fused tensor. It may look at the output axis only (axis 0, or the last one of a tensor that it
    transposes) and takes any size of the input axis, and none, as biases have none: adapters push their low-rank
    factors ``[out, rank]`` through the transforms of the weights that they change."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of the module: its pieces, each split for the rank, then joined along axis 0.

    A tensor of the checkpoint belongs to one parameter. Where it is several parts fused, several pieces of that
    parameter name it, each with a transform that takes another part: queries, keys and values are split by other rules.
    """

    target: str
    pieces: tuple[Piece, ...]


class ModelFamily(ABC):
    """One or several architectures that share a module written with ``trtllm_core.nn``."""

    name: str
    architectures: tuple[str, ...]
    """Names in a Hugging Face ``config.json``, such as ``LlamaForCausalLM``."""
    gguf_architectures: tuple[str, ...] = ()
    """Values of GGUF's ``general.architecture``."""

    @abstractmethod
    def config(self, checkpoint: CheckpointView) -> ModelConfig:
        """What the checkpoint's own config says, as a ``ModelConfig`` with validated ``extras``.

        ``dtype`` is the floating-point type that the checkpoint names, or float32.

        Raises:
            CheckpointError: for a variant that the family does not support, naming it.
        """

    @abstractmethod
    def weights(self, config: ModelConfig, checkpoint: CheckpointView) -> Sequence[Weight]:
        """How each parameter of ``module`` is made of the checkpoint's tensors."""

    def unused(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is known not to be needed, such as a stored rotary table."""
        return False

    @abstractmethod
    def module(self, config: ModelConfig, parallel: TensorParallel) -> nn.Module:
        """The module of one rank, on torch's current default device (``meta`` when an engine is loaded).

        It offers ``forward(input_ids, context) -> hidden`` and ``logits(hidden) -> logits``; see ``trtllm_core.nn``.
        """
