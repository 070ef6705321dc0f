"""A request at the scheduler, and what became of the requests of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.plugin import Hypothesis
from trtllm_core.plugin.observer import RequestStats, StepStats


@dataclass(slots=True, eq=False)
class Ticket:
    """A request from its arrival at the scheduler to its end. All times are seconds of the scheduler's clock."""

    request: Request
    plan: Plan
    """As it was checked, alone: what it needs and returns."""
    order: tuple[float, int]
    """The smaller goes first: by priority and arrival."""
    arrived: float
    priority: int = 0
    deadline: float | None = None
    """When it ends as ``timed_out``, wherever it is then."""
    live: LiveRequest | None = None
    """None while it waits for its start, and where it was refused."""
    error: Exception | None = None
    """Why it was refused. What a plugin raised is in ``live.error``."""
    started: float | None = None
    told: float | None = None
    """When its first token was there."""
    ended: float | None = None
    stats: RequestStats | None = None
    """What there is to say of it, once it is over."""

    def end_in_queue(self, reason: str) -> list[Delta]:
        """It ends before it has started: it leaves as many sequences as it returns, all of them empty."""
        numbers = range(self.plan.branching.returns)
        sequences = tuple(Hypothesis((), reason=reason, branch=n) for n in numbers)
        self.live = LiveRequest(self.request, self.plan, (), sequences=sequences)
        return [Delta(self.request.request_id, (), finish_reason=reason, sequence=n) for n in numbers]

    def __lt__(self, other: Ticket) -> bool:
        return self.order < other.order

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.ended is not None

    @property
    def stage(self) -> str:
        """``queued``, ``context``, ``generation``, ``paused`` or ``complete``."""
        if self.over:
            return "complete"
        if self.live is None:
            return "queued"
        if self.live.put_off:
            return "paused"
        return "context" if self.told is None else "generation"


@dataclass(slots=True)
class Turn:
    """What a call of ``Scheduler.step`` brought about, and what happened since the one before."""

    deltas: list[Delta] = field(default_factory=list)
    started: list[Ticket] = field(default_factory=list)
    ended: list[Ticket] = field(default_factory=list)
    stats: list[StepStats] = field(default_factory=list)
    """Of the engine's steps that ended, where somebody wants them."""

    def __bool__(self) -> bool:
        return bool(self.deltas or self.ended)
