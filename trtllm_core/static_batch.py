"""``StaticBatch``: which requests of a batch run in a step, until all of them have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack

from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import PlanItem
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.loop import StepLoop
from trtllm_core.lora import LoraManager
from trtllm_core.plugin.kv_policy import OutOfBlocksError
from trtllm_core.plugin.observer import RequestStats


class StaticBatch:
    """First come, first served: requests start as soon as there is room, and leave when they end.

    Where the cache runs out, which happens under policies that admit without a promise, the request that came last is
    put off: it gives its cache back and computes its text anew once another request has ended.
    """

    def __init__(self, loop: StepLoop, lora: LoraManager) -> None:
        self._loop = loop
        self._lora = lora
        self._branches = loop.branches
        self._budget = loop.session.config.build.max_num_tokens
        self._running = False
        self._freed = False  # a request has ended since those that were put off were last tried

    def run(self, requests: Sequence[Request], started: dict[str, LiveRequest]) -> Generator[list[Delta]]:
        """Steps until all requests ended: first come, first served. Whoever stops iterating ends the rest.

        ``started`` is filled with the requests as they start, by their ids.

        Raises:
            ConfigError: another batch is running, or a request cannot work: then nobody gets a token.
            CapacityError: a request could never run.
        """
        self.check_idle()
        self._running = True
        live: list[LiveRequest] = []  # started, and their end not told yet
        with ExitStack() as stack:  # at the end calls all of them, whatever one raises
            stack.callback(setattr, self, "_running", False)
            stack.enter_context(self._lora.using(request.adapter for request in requests))
            stack.callback(self._cancel_all, live)
            self._check(requests)
            waiting = deque(requests)
            while waiting or live:
                deltas = self._admit(waiting, live, started)
                slots, counts = self._reserve(live)
                if slots:
                    deltas += self._loop.step(slots, counts)
                ended = [one for one in live if one.over]
                live[:] = [one for one in live if not one.over]
                for one in ended:
                    self._tell_end(one)
                    self._freed = True
                yield deltas

    def check_idle(self) -> None:
        """Refuse to go on while a batch runs.

        Raises:
            ConfigError: one does.
        """
        if self._running:
            raise ConfigError("another batch is still running on this session: use up or close its stream first")

    def _check(self, requests: Sequence[Request]) -> None:
        """Refuse what cannot work before the first token of anybody."""
        processors: dict[str, dict[object, PlanItem]] = {}  # by preset
        ranks = self._loop.session.config.build.tp_size
        for request in requests:
            prompt, sampling = len(request.prompt), request.sampling
            beside = processors.setdefault(sampling.preset, {})
            plan = self._branches.plan(request, beside.values())
            beside.update({item.key: item for item in plan.processors})
            self._loop.cache.check_window(sampling.max_attention_window_size, sampling.sink_token_length)
            most = plan.branching.max_branches
            self._loop.cache.check(prompt, sampling.max_new_tokens, sampling.cache_priority, most)
            if ranks > 1 and not plan.greedy and request.sampling.random_seed is None:
                raise ConfigError(
                    f"give random_seed: decoder {plan.decoder.name!r} draws, and {ranks} ranks must draw alike"
                )

    def _admit(self, waiting: deque[Request], live: list[LiveRequest], started: dict[str, LiveRequest]) -> list[Delta]:
        """Let requests start, in order, while there is room. Those whose plugins fail at once come back as deltas."""
        if not self._resume(live):
            return []
        failed = []
        while waiting:
            one = self._loop.admit(waiting[0])
            if one is None:
                if all(other.over for other in live):
                    raise CapacityError("the KV pool has no room for a request although nothing runs: a policy's error")
                break
            waiting.popleft()
            started[one.request.request_id] = one
            live.append(one)
            if one.error is not None:
                failed += self._loop.end(one, "plugin_error")
        return failed

    def _resume(self, live: Sequence[LiveRequest]) -> bool:
        """Let requests that were put off go on, in order, once another one has ended. Nobody else starts before."""
        off = [one for one in live if one.put_off]
        if not self._freed and len(off) < len(live):
            return not off
        self._freed = False
        while off and self._loop.resume(off[0]):
            off.pop(0)
        if off and len(off) == len(live):
            raise CapacityError("the KV pool has no room for a request although nothing runs: a policy's error")
        return not off

    def _reserve(self, live: Sequence[LiveRequest]) -> tuple[list[int], list[int]]:
        """Who runs how many tokens, and room for them. Where there is none, those who came last are put off.

        Raises:
            CapacityError: there is no room even for the first one alone.
        """
        if self._branches.verifying:
            self._loop.propose(self._generating(live))
        while True:
            slots, counts = self._schedule(live)
            try:
                self._loop.reserve(slots, counts)
            except OutOfBlocksError:
                running = [one for one in live if not (one.over or one.put_off)]
                if len(running) < 2:
                    raise
                self._loop.preempt(running[-1])
                self._freed = False
            else:
                return slots, counts

    def _cancel_all(self, live: Sequence[LiveRequest]) -> None:
        with ExitStack() as stack:
            for one in live:
                stack.callback(self._cancel, one)

    def _cancel(self, live: LiveRequest) -> None:
        """The batch is over before this request is. One that ended in a step that failed may still hold slots."""
        try:
            self._loop.end(live, "cancelled")
        finally:
            self._tell_end(live)

    def _schedule(self, live: Sequence[LiveRequest]) -> tuple[list[int], list[int]]:
        """Who runs how many tokens: the next one of all that generate, then prompts, then drafts, cut to the step's
        budget."""
        known, cached = self._branches.slots.lengths, self._loop.cache.cached
        left = self._budget
        running = [branch.slot for one in live if not one.put_off for branch in one.running]
        ready = sorted((int(known[slot] - cached[slot]), i) for i, slot in enumerate(running))
        slots, counts = [], []
        for wanted, i in ready:
            count = min(wanted, left)
            if count:
                slots.append(running[i])
                counts.append(count)
                left -= count
        if self._branches.verifying:
            for place, (slot, count) in enumerate(zip(slots, counts, strict=True)):
                more = min(int(self._branches.drafts.counts[slot]), left)
                if more and count == known[slot] - cached[slot]:
                    counts[place] += more
                    left -= more
        return slots, counts

    def _generating(self, live: Sequence[LiveRequest]) -> list[int]:
        """Slots that lack one token in the cache, their last."""
        known, cached = self._branches.slots.lengths, self._loop.cache.cached
        running = (branch.slot for one in live if not one.put_off for branch in one.running)
        return [slot for slot in running if known[slot] - cached[slot] == 1]

    def _tell_end(self, live: LiveRequest) -> None:
        request = live.request
        self._loop.plugins.on_request_end(
            RequestStats(
                request.request_id,
                len(request.prompt),
                live.generated,
                live.finish_reason or "",
                live.plugin_seconds,
                live.cached_prompt,
                live.preemptions,
            )
        )
