"""Base classes of logits processors. One hook, two kinds: on the device in batches, or plain Python per slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trtllm_core.plugin.lifecycle import SlotPlugin

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trtllm_core.plugin.views import BranchView, LogitsBatch


class Phase(StrEnum):
    """Where in the pipeline a processor stands. The order of phases is data: see ``decoding.order``."""

    BIAS = "bias"
    PENALTY = "penalty"
    CONSTRAINT = "constraint"
    TEMPERATURE = "temperature"
    TRUNCATION = "truncation"


@dataclass(frozen=True, slots=True)
class LogitsCapabilities:
    """What a processor can take part in. The core plans by these and refuses what cannot work."""

    argmax_invariant: bool = False
    """It never changes which logit is largest, so that a greedy choice may skip it."""
    speculation: Literal["none", "per_position", "rewind"] = "none"
    graph_safe: bool = False
    """``apply`` and ``commit`` may be captured in a CUDA graph: fixed shapes, no sync, no Python branch on data.

    A step that replays the graph does not call them: what changes from step to step must be in tensors, which stay
    where they are while ``graph_key`` stays the same.
    """
    needs: frozenset[str] = frozenset()
    """What else it must be given, such as ``hidden_states``; a backend without it refuses the request."""


class LogitsProcessor(SlotPlugin):
    """What both kinds share."""

    phase: ClassVar[Phase] = Phase.BIAS
    before: ClassVar[tuple[str, ...]] = ()
    """Registered names that must run after this one."""
    after: ClassVar[tuple[str, ...]] = ()
    """Registered names that must run before this one."""
    capabilities: ClassVar[LogitsCapabilities] = LogitsCapabilities()

    def companions(self, view: BranchView) -> Sequence[Sequence[int]]:
        """Prompts of branches that run beside each branch of a request, commit its tokens and are never emitted.

        Each is a branch of its own to the cache and takes a slot. It runs in the steps of its owner; nobody processes
        or samples its logits, which ``apply`` finds in ``LogitsBatch.companion_logits``. Asked when the request is
        planned, before ``setup`` and maybe more than once: the answer must depend on the view alone, whose ``slot`` is
        -1. ``ConfigError`` refuses the request. ``explain`` shows a view with an empty prompt.
        """
        return ()


class DeviceLogitsProcessor(LogitsProcessor):
    """Works on all positions of a step at once and keeps its state in tensors indexed by slot. It never syncs."""

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> torch.Tensor | None:
        """Change ``logits`` (float32 ``[n, vocab_size_padded]``, on the device) in place and return None,
        or return a new tensor of the same shape, dtype and device. State does not move here.

        Positions whose ``batch.active`` is False belong to requests that did not ask for this plugin.
        """
        raise NotImplementedError


class HostLogitsProcessor(LogitsProcessor):
    """Plain Python for one branch at a time: write ``start`` and ``process``, or ``start`` and ``mask``.

    The state that ``start`` returns is handed back to every other method; the core keeps one for each slot and copies
    it with ``copy`` when branches fork. It does so in ``begin``, ``commit``, ``fork`` and ``rewind``: a host plugin
    that has one of those itself is refused.
    """

    def start(self, view: BranchView) -> Any:
        """State of a new branch: any object."""
        return None

    def process(self, state: Any, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Change ``logits`` (float32 ``[vocab_size_padded]``) in place. ``tokens`` is prompt and committed."""

    def process_beside(self, state: Any, tokens: Sequence[int], logits: torch.Tensor, companions: torch.Tensor) -> None:
        """In place of ``process``, for a processor with companions: their raw logits are float32
        ``[c, vocab_size_padded]``, read-only, in the order of ``companions``."""

    def mask(self, state: Any, tokens: Sequence[int], words: np.ndarray) -> bool:
        """The mask-only form: clear bit ``t % 32`` of ``words[t // 32]`` (int32 ``[ceil(vocab/32)]``, all ones at
        the call) for each forbidden token and return True. It runs while the forward pass does. False: no mask.

        ``words.view("uint32")`` spares Python the sign of bit 31."""
        return False

    def accept(self, state: Any, tokens: Sequence[int]) -> Any:
        """Tokens were committed. Returns the new state, which may be the same object.

        In a verify step it is called on a copy, for the drafts before a position. ``BranchError`` for a token that the
        plugin forbids then only says that what follows that draft can never be chosen.
        """
        return state

    def copy(self, state: Any) -> Any:
        """An independent copy for a forked branch. The default deep-copies."""
        import copy

        return copy.deepcopy(state)

    def take_back(self, state: Any, n: int) -> Any:
        """The last ``n`` tokens are taken back. Returns the state before them."""
        raise NotImplementedError(f"{type(self).__name__} cannot rewind")

    def forced(self, state: Any) -> Sequence[int]:
        """Tokens that must come next, if they are known (jump-forward)."""
        return ()
