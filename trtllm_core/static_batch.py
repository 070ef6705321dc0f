"""``StaticBatch``: a list of requests, scheduled until all of them have ended."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack

from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import Plan, PlanItem
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.errors import ConfigError
from trtllm_core.loop import StepLoop
from trtllm_core.lora import LoraManager
from trtllm_core.scheduling import Scheduler


class StaticBatch:
    """First come, first served, over the ``Scheduler`` that the executor uses, too."""

    def __init__(self, loop: StepLoop, lora: LoraManager) -> None:
        self._loop = loop
        self._lora = lora
        self.user: str | None = None
        """Who runs on the session now, as a sentence names it."""

    def run(self, requests: Sequence[Request], started: dict[str, LiveRequest]) -> Generator[list[Delta]]:
        """Steps until all requests ended: first come, first served. Whoever stops iterating ends the rest.

        ``started`` is filled with the requests as they start, by their ids.

        Raises:
            ConfigError: another batch is running, or a request cannot work: then nobody gets a token.
            CapacityError: a request could never run.
        """
        self.check_idle()
        self.user = "another batch is still running on this session: use up or close its stream first"
        with ExitStack() as stack:  # at the end calls all of them, whatever one raises
            stack.callback(setattr, self, "user", None)
            stack.enter_context(self._lora.using(request.adapter for request in requests))
            scheduler = Scheduler(self._loop, strict=True)
            stack.callback(scheduler.close)
            plans = self._check(requests)
            # Where a user gives no seed each rank has drawn one: that of the first counts, as ranks must draw alike.
            seeds = self._loop.session.engine.broadcast([request.seed for request in requests])
            alike = [request.with_seed(seed) for request, seed in zip(requests, seeds, strict=True)]
            for request, plan in zip(alike, plans, strict=True):
                scheduler.add(request, plan)
            while scheduler.busy:
                turn = scheduler.step()
                started |= {one.request.request_id: one.live for one in turn.started if one.live is not None}
                yield turn.deltas

    def check_idle(self) -> None:
        """Refuse to go on while somebody runs.

        Raises:
            ConfigError: somebody does.
        """
        if self.user is not None:
            raise ConfigError(self.user)

    def _check(self, requests: Sequence[Request]) -> list[Plan]:
        """Refuse what cannot work before the first token of anybody."""
        plans = []
        processors: dict[str, dict[object, PlanItem]] = {}  # by preset
        for request in requests:
            beside = processors.setdefault(request.sampling.preset, {})
            plan = self._loop.check(request, beside.values())
            beside.update({item.key: item for item in plan.processors})
            plans.append(plan)
        return plans
