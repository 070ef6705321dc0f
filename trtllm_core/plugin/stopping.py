"""Base classes of stopping criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trtllm_core.plugin.lifecycle import SlotPlugin

if TYPE_CHECKING:
    import torch

    from trtllm_core.plugin.views import BranchView, CommitBatch, FinishReason

Matched = str | int | tuple[int, ...] | None
"""Text, a token or a token sequence."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A branch ends."""

    reason: FinishReason
    at: int = 0
    """Index, among the newly chosen tokens, of the last one that stays; those after it are taken back."""
    counted: bool = True
    """Whether token ``at`` belongs to the text. The end token is written but does not count in the length."""
    trim_text: int = 0
    """Bytes to cut from the end of the text: where a stop string matched, the match and what follows it."""
    matched: Matched = None
    """What matched, for the result."""


@dataclass(frozen=True, slots=True)
class StoppingCapabilities:
    """What a criterion can take part in, and what it must be given."""

    speculation: Literal["none", "per_position", "rewind"] = "per_position"
    graph_safe: bool = False
    """Of a device criterion: ``check`` and ``commit`` may be captured in a CUDA graph, as of ``LogitsCapabilities``."""
    needs: frozenset[str] = frozenset()
    """``text`` (the engine must have a tokenizer) or ``logits`` (device criteria only: see ``CommitBatch.logits``)."""


class StoppingCriterion(SlotPlugin):
    """What both kinds share."""

    scope: ClassVar[Literal["row", "request"]] = "row"
    """What it ends: the branch that it was asked about, or all branches of its request. Those keep the tokens of the
    step, and take over its reason where they do not end by themselves."""
    capabilities: ClassVar[StoppingCapabilities] = StoppingCapabilities()


class DeviceStoppingCriterion(StoppingCriterion):
    """Answers for all rows of a step at once, without a sync."""

    reason: ClassVar[FinishReason]
    """Why a row ends that this criterion stops."""
    counted: ClassVar[bool] = True
    """As ``Stop.counted``."""

    def check(self, batch: CommitBatch) -> torch.Tensor:
        """int64 ``[n]``: index, among the row's new tokens, of the last one that stays; -1 goes on. Changes nothing."""
        raise NotImplementedError

    def matched(self, slot: int, tokens: Sequence[int]) -> Matched:
        """What matched, for the result. Asked on the host once a row has stopped; ``tokens`` is prompt and generated,
        up to the token that stopped it. ``context`` may know of later ones already."""
        return None


class HostStoppingCriterion(StoppingCriterion):
    """Plain Python for one branch at a time, over the state that ``start`` returned for it."""

    def start(self, view: BranchView) -> Any:
        """State of a new branch: any object."""
        return None

    def check(self, state: Any, tokens: Sequence[int], new: Sequence[int]) -> Stop | None:
        """``tokens`` is prompt and committed, ``new`` what this step chose. Pure: the state moves in ``accept``.

        On the device ``context`` may know of these and of later tokens already: they are not to be looked at.
        """
        raise NotImplementedError

    def accept(self, state: Any, tokens: Sequence[int]) -> Any:
        """``tokens`` (the new ones) were committed. Returns the new state, which may be the same object."""
        return state

    def pending_text(self, state: Any) -> int:
        """Bytes at the end of the text that a stream must hold back, because a match may have begun there."""
        return 0

    def copy(self, state: Any) -> Any:
        """An independent copy for a forked branch. The default deep-copies."""
        import copy

        return copy.deepcopy(state)

    def take_back(self, state: Any, n: int) -> Any:
        """The last ``n`` tokens are taken back. Returns the state before them."""
        raise NotImplementedError(f"{type(self).__name__} cannot rewind")
