"""The life of state that is kept by slot, the same for every plugin that keeps some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch
    from pydantic import BaseModel

    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext


@dataclass(frozen=True, slots=True)
class Example:
    """One way to ask for a plugin, such that it does something."""

    params: Mapping[str, Any] = field(default_factory=dict)
    """Its own parameters."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``SamplingConfig``."""


class SlotPlugin:
    """``setup`` once a session, then for each branch ``begin → … commit → [fork] → [rewind] → end``.

    One object serves all slots of a session. Everything here may be left as it is by a plugin without state.
    """

    Params: ClassVar[type[BaseModel] | None] = None
    """pydantic model of the plugin's parameters; None takes none."""
    examples: ClassVar[Sequence[Example]] = ()
    """What the conformance kits and ``trtllm-core conform`` try it with, where they are not told anything else; none:
    a request that names it and sets nothing. A plugin that must be given something has at least one."""

    @property
    def graph_key(self) -> Hashable:
        """What the plugin's device code branches on in Python, such as how wide its tables are.

        It may change in ``begin`` and ``end``, never in between. A CUDA graph that was captured under another key is
        not replayed. None: nothing.
        """
        return None

    def setup(self, context: DecodingContext) -> None:
        """Allocate state for ``context.slots`` slots. Called once for a session, before anything else."""

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts in ``slot``: write its state. What the slot held before is garbage."""

    def commit(self, batch: CommitBatch) -> None:
        """Tokens were accepted: the only place where state follows the text. Rows not ``active`` are others'."""

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy the state of slots ``src`` to slots ``dst`` (both int64 ``[m]``), **all at the same time**.

        A slot may stand in both: gather everything first, then scatter, so that 0←1, 1←0 swaps. Every slot in ``dst``
        is live: where the branch is new, ``begin`` was called for it before, so host-side notes of what the request
        asked for are there already.
        """

    def rewind(self, slot: int, n: int) -> None:
        """The last ``n`` committed tokens of ``slot`` are taken back. ``context.lengths`` no longer counts them."""

    def end(self, slot: int) -> None:
        """The branch is over; the slot will be reused."""
