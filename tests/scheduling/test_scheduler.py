"""The scheduler over a loop on paper: budgets, order, preemption, ends; whatever comes and goes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scale import queue_cost
from trtllm_core import SamplingConfig
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin import Hypothesis
from trtllm_core.plugin.kv_policy import OutOfBlocksError
from trtllm_core.scheduling import Scheduler, Ticket, WaitingQueue

PLAN: Any = SimpleNamespace(branching=SimpleNamespace(max_branches=1, returns=1), ranked=False)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class PaperLoop:
    """Requests that have ``max_new_tokens`` tokens; a cache of so many tokens, which is admitted to optimistically."""

    slots: int = 4
    tokens: int = 1000
    max_num_tokens: int = 16
    steps: int = 0
    ran: list[dict[str, int]] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    asked: int = 0
    """How often a request asked for its start."""
    refuse: set[str] = field(default_factory=set)
    looks_ahead: bool = False
    slack: int = 0
    """How much longer a request could be than it becomes: a step that looks ahead runs such a one once too often."""

    def __post_init__(self) -> None:
        self.lives: dict[int, LiveRequest] = {}
        self._free = list(range(self.slots))
        build = SimpleNamespace(max_num_tokens=self.max_num_tokens, max_branches=self.slots)
        self.session = SimpleNamespace(config=SimpleNamespace(build=build))
        self.plugins = SimpleNamespace(observes_steps=False, on_request_end=self.told.append)
        lengths = np.zeros(self.slots, np.int64)
        table = SimpleNamespace(
            lengths=lengths, ahead=np.zeros_like(lengths), limits=np.zeros_like(lengths), free=self.slots
        )
        self.branches = SimpleNamespace(slots=table, verifying=set(), owners=self.lives, companions=())
        self.cache = SimpleNamespace(
            cached=np.zeros(self.slots, np.int64),
            plan=SimpleNamespace(evicts=False, tokens_per_block=1),
            usage=lambda: SimpleNamespace(free=self.room, total=self.tokens, cached=0),
        )

    @property
    def steps_of(self) -> dict[str, list[int]]:
        """The steps that each request ran in."""
        names = {name for ran in self.ran for name in ran}
        return {name: [step for step, ran in enumerate(self.ran) if name in ran] for name in names}

    @property
    def room(self) -> int:
        return self.tokens - int(self.cache.cached.sum())

    def admit(self, request: Request, plan: Any) -> LiveRequest | None:
        self.asked += 1
        if request.request_id in self.refuse:
            raise ConfigError("not this one")
        if not self._free or len(request.prompt) + 1 > self.room:
            return None
        slot = self._free.pop(0)
        self.branches.slots.free -= 1
        live = LiveRequest(request, PLAN, (slot,))
        live.running.append(Branch(live, slot, 0))
        self.lives[slot] = live
        table = self.branches.slots
        table.lengths[slot], table.ahead[slot] = len(request.prompt), 0
        table.limits[slot] = len(request.prompt) + request.sampling.max_new_tokens + self.slack
        self.cache.cached[slot] = 0
        self.admitted.append(request.request_id)
        return live

    def preempt(self, live: LiveRequest) -> None:
        live.put_off = True
        live.preemptions += 1
        self.cache.cached[live.slots[0]] = 0
        self.preempted.append(live.request.request_id)

    def resume(self, live: LiveRequest) -> bool:
        if int(self.branches.slots.lengths[live.slots[0]]) + 1 > self.room:
            return False
        live.put_off = False
        self.resumed.append(live.request.request_id)
        self.resumed_at.append(self.steps)
        return True

    def reserve(self, slots: list[int], counts: list[int]) -> None:
        if sum(counts) > self.room:
            raise OutOfBlocksError(1)

    def launch(self, slots: list[int], counts: list[int]) -> list[LiveRequest]:
        assert len(set(slots)) == len(slots)
        assert sum(counts) <= self.room
        self.steps += 1
        self.ran.append({self.lives[s].request.request_id: n for s, n in zip(slots, counts, strict=True)})
        table, asked = self.branches.slots, []
        for slot, count in zip(slots, counts, strict=True):
            self.cache.cached[slot] += count
            known = table.lengths[slot] + table.ahead[slot]
            assert self.cache.cached[slot] <= known <= table.limits[slot]
            assert table.ahead[slot] <= self.looks_ahead, "it would run a token that even the device does not have"
            if self.cache.cached[slot] == known:
                table.ahead[slot] += 1
                asked.append(self.lives[slot])
        return asked

    def forget(self) -> None:
        pass

    def land(self, flight: list[LiveRequest]) -> list[Delta]:
        deltas = []
        for live in flight:
            if live.over:
                continue
            (slot,) = live.slots
            live.running[0].generated.append(1)
            self.branches.slots.lengths[slot] += 1
            self.branches.slots.ahead[slot] -= 1
            done = len(live.running[0].generated) == live.request.sampling.max_new_tokens
            deltas.append(Delta(live.request.request_id, (1,), finish_reason="length" if done else None))
            if done:
                self._leave(live, "length")
        return deltas

    def end(self, live: LiveRequest, reason: str) -> list[Delta]:
        if not live.over:
            self._leave(live, reason)
        return [Delta(live.request.request_id, (), finish_reason=reason)]

    def _leave(self, live: LiveRequest, reason: str) -> None:
        live.sequences = (Hypothesis(tuple(live.running[0].generated), reason=reason),)
        live.running = []
        (slot,) = live.slots
        self.cache.cached[slot] = self.branches.slots.lengths[slot] = 0
        self._free.append(slot)
        self.branches.slots.free += 1


def made(loop: PaperLoop, **options: Any) -> tuple[Scheduler, Clock]:
    clock = Clock()
    return Scheduler(loop, clock=clock, **options), clock  # type: ignore[arg-type]


def request(name: str, prompt: int = 3, new: int = 3) -> Request:
    return Request(name, [1] * prompt, SamplingConfig(max_new_tokens=new, random_seed=0))


def add(scheduler: Scheduler, name: str, prompt: int = 3, new: int = 3, **more: Any) -> Ticket:
    return scheduler.add(request(name, prompt, new), PLAN, **more)


def finish(scheduler: Scheduler) -> list[str]:
    ended = []
    for _ in range(10_000):
        if not scheduler.busy:
            return ended
        ended += [ticket.request.request_id for ticket in scheduler.step().ended]
    raise AssertionError("it does not end")


def test_decode_rows_run_first_and_prompts_take_what_is_left() -> None:
    loop = PaperLoop(slots=3, max_num_tokens=8)
    scheduler, _ = made(loop)
    add(scheduler, "a", prompt=2, new=6)
    scheduler.step()
    add(scheduler, "b", prompt=20)
    add(scheduler, "c", prompt=3)
    finish(scheduler)
    assert loop.ran[:5] == [
        {"a": 2},
        {"a": 1, "b": 7},
        {"a": 1, "b": 7},
        {"a": 1, "b": 6, "c": 1},
        {"a": 1, "b": 1, "c": 2},
    ]


def test_finished_rows_leave_at_once_and_the_next_starts_in_the_next_step() -> None:
    loop = PaperLoop(slots=1)
    scheduler, _ = made(loop)
    add(scheduler, "a", new=1)
    add(scheduler, "b", new=1)
    assert [ticket.request.request_id for ticket in scheduler.step().ended] == ["a"]
    assert [ticket.request.request_id for ticket in scheduler.step().ended] == ["b"]
    assert loop.steps == 2


def test_a_request_that_found_no_room_does_not_ask_again_before_something_has_changed() -> None:
    loop = PaperLoop(slots=1)
    scheduler, _ = made(loop)
    add(scheduler, "long", prompt=1, new=50)
    add(scheduler, "next")
    finish(scheduler)
    assert loop.asked <= 5, "twice while the first read its prompt, once when it had left"


def test_who_is_put_off_last_in_order_goes_on_before_anybody_starts() -> None:
    loop = PaperLoop(slots=4, tokens=14)
    scheduler, _ = made(loop)
    for name in "abc":
        add(scheduler, name, prompt=3, new=8)
    while not loop.preempted:
        scheduler.step()
    add(scheduler, "late", prompt=1, new=1)
    ended = finish(scheduler)
    assert loop.preempted[0] == "c"
    assert "a" not in loop.preempted
    assert ended[0] == "a"
    assert len(ended) == 4
    assert loop.resumed
    assert loop.steps_of["late"][0] >= loop.resumed_at[0], "there was room for it, but others came first"


def test_a_request_for_which_there_is_no_room_even_alone() -> None:
    loop = PaperLoop(tokens=6)
    scheduler, _ = made(loop)
    small, big = add(scheduler, "small", prompt=2, new=2), add(scheduler, "big", prompt=3, new=50)
    finish(scheduler)
    assert small.error is None
    assert isinstance(big.error, OutOfBlocksError)
    assert [stats.finish_reason for stats in loop.told] == ["length", "refused"]
    strict, _ = made(PaperLoop(tokens=6), strict=True)
    add(strict, "big", prompt=3, new=50)
    with pytest.raises(OutOfBlocksError):
        finish(strict)


def test_a_policy_that_admits_nobody_is_an_error_and_no_endless_loop() -> None:
    scheduler, _ = made(PaperLoop(tokens=3))
    add(scheduler, "a", prompt=5)
    with pytest.raises(CapacityError, match="although nothing runs: a policy's error"):
        scheduler.step()


def test_refused_alone_when_it_starts() -> None:
    loop = PaperLoop(refuse={"b"})
    scheduler, _ = made(loop)
    tickets = [add(scheduler, name) for name in "abc"]
    finish(scheduler)
    assert [ticket.error is None for ticket in tickets] == [True, False, True]


def test_priorities_are_worth_seconds_of_waiting_or_everything() -> None:
    for worth, order in ((10.0, ["a", "b", "c"]), (100.0, ["b", "a", "c"]), (None, ["b", "a", "c"])):
        loop = PaperLoop(slots=1)
        scheduler, clock = made(loop, priority_seconds=worth)
        add(scheduler, "a")
        clock.now = 15
        add(scheduler, "b", priority=1)
        add(scheduler, "c", priority=0)
        finish(scheduler)
        assert loop.admitted == order


def test_deadlines_end_requests_wherever_they_are() -> None:
    loop = PaperLoop(slots=1)
    scheduler, clock = made(loop)
    runs, waits = add(scheduler, "runs", new=50, deadline=5.0), add(scheduler, "waits", deadline=3.0)
    scheduler.step()
    clock.now = 4
    assert scheduler.step().ended == [waits]
    assert waits.live is not None
    assert (waits.live.finish_reason, waits.live.generated, waits.started) == ("timed_out", 0, None)
    clock.now = 6
    turn = scheduler.step()
    assert turn.ended == [runs]
    assert runs.live is not None
    assert (runs.live.finish_reason, runs.live.generated) == ("timed_out", 2)
    assert not scheduler.busy


def test_close_cancels_all_wherever_they_are() -> None:
    loop = PaperLoop(slots=3, tokens=9)
    scheduler, _ = made(loop)
    tickets = [add(scheduler, str(i), prompt=2, new=20) for i in range(5)]
    for _ in range(5):
        scheduler.step()
    assert scheduler.paused
    turn = scheduler.close()
    assert {ticket.request.request_id for ticket in turn.ended} == set("01234")
    assert {ticket.live.finish_reason for ticket in tickets if ticket.live} == {"cancelled"}
    assert (loop.branches.slots.free, scheduler.busy, scheduler.active, scheduler.waiting) == (3, False, 0, 0)


LIVES = st.lists(
    st.tuples(
        st.integers(1, 20),  # prompt
        st.integers(1, 12),  # new tokens
        st.integers(0, 2),  # priority
        st.integers(0, 3),  # steps before it arrives
        st.sampled_from(["runs", "runs", "runs", "cancelled", "late"]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    LIVES,
    st.integers(1, 5),
    st.integers(33, 80),
    st.integers(5, 20),
    st.integers(0, 99),
    st.booleans(),
    st.integers(0, 1),
)
def test_whatever_comes_and_goes(
    lives, slots: int, tokens: int, budget: int, seed: int, ahead: bool, slack: int
) -> None:
    """Never over budget; everybody ends, and well; the order of starts; those put off go on first, in order."""
    budget = max(budget, slots)
    loop, rng = PaperLoop(slots, tokens, budget, looks_ahead=ahead, slack=slack), random.Random(seed)
    scheduler, clock = made(loop)
    tickets: list[Ticket] = []
    todo = list(lives)
    started: set[str] = set()
    for _ in range(3000):
        while todo and (todo[0][3] == 0 or rng.random() < 0.3):
            prompt, new, priority, _, fate = todo.pop(0)
            deadline = clock.now + rng.randint(1, 30) if fate == "late" else None
            tickets.append(add(scheduler, str(len(tickets)), prompt, new, priority=priority, deadline=deadline))
        for ticket, life in zip(tickets, lives, strict=False):
            if life[4] == "cancelled" and rng.random() < 0.1:
                scheduler.end(ticket, "cancelled")
        clock.now += 1
        waiting = [one for one in tickets if one.live is None and not one.over]
        off = [one for one in tickets if one.live is not None and one.live.put_off and not one.over]
        counts = len(loop.ran), len(loop.preempted), len(loop.resumed)
        turn = scheduler.step()
        # Who started was the first in order; and nobody started while somebody was put off.
        new_ones = [one for one in turn.started if one.request.request_id not in started]
        started |= {one.request.request_id for one in new_ones}
        alive = [one for one in waiting if not (one.deadline is not None and one.deadline <= clock.now)]
        assert new_ones == sorted(alive)[: len(new_ones)]
        resumed = loop.resumed[counts[2] :]
        going = sorted(one for one in off if not one.over or one.request.request_id in resumed)
        assert resumed == [one.request.request_id for one in going][: len(resumed)]
        assert not (new_ones and len(resumed) < len([one for one in going if one.deadline is None]))
        # The budget; and whoever generates has its next token in every step.
        for ran in loop.ran[counts[0] :]:
            assert sum(ran.values()) <= budget
        victims = loop.preempted[counts[1] :]
        if len(loop.ran) > counts[0]:
            running = [one for one in tickets if one.live and one.live.running and not one.live.put_off]
            first = min(running, default=None)
            assert first is None or first.request.request_id not in victims
            ran = loop.ran[-1]
            for one in running:
                late = one.told is None or one.live.preemptions
                assert one.request.request_id in ran or late, (one.request.request_id, ran, clock.now, loop.ran[-4:])
        if not (todo or scheduler.busy):
            break
    assert not todo
    assert not scheduler.busy
    for ticket, (_, new, _, _, fate) in zip(tickets, lives, strict=True):
        assert ticket.over
        assert ticket.error is None
        reason, count = ticket.live.finish_reason, ticket.live.generated
        assert (reason, count) == ("length", new) or (reason, fate) in (
            ("cancelled", "cancelled"),
            ("timed_out", "late"),
        )
    assert loop.room == tokens
    assert len(loop.told) == len(lives)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard"]), st.integers(0, 5)), max_size=60), st.integers())
def test_the_queue_is_a_sorted_list(steps: list[tuple[str, int]], seed: int) -> None:
    queue, model, rng = WaitingQueue(), [], random.Random(seed)
    for number, (what, rank) in enumerate(steps):
        if what == "push":
            ticket = Ticket(request(str(number)), PLAN, (rank, number), 0.0)
            queue.push(ticket)
            model.append(ticket)
        elif model and what == "pop":
            assert queue.pop() is min(model)
            model.remove(min(model))
        elif model:
            gone = rng.choice(model)
            queue.discard(gone)
            model.remove(gone)
        assert len(queue) == len(model)
        assert queue.first() is min(model, default=None)
        assert len(queue._heap) <= 2 * len(model) + 1


def test_scheduling_costs_the_same_however_many_wait() -> None:
    """The best of several tries, because other work of the machine only adds."""
    few, many = (min(queue_cost(waiting, steps=50)[0] for _ in range(3)) for waiting in (100, 50_000))
    assert many < 5 * few, f"{1e6 * few:.0f} µs with 100 waiting, {1e6 * many:.0f} µs with 50,000"


def test_branches_of_a_request_run_their_last_tokens_together() -> None:
    """A search chooses among all of its branches: after a preemption none of them may ask before the others."""
    loop = PaperLoop(slots=3, max_num_tokens=8)
    scheduler, _ = made(loop)
    plan: Any = SimpleNamespace(branching=SimpleNamespace(max_branches=2, returns=2), ranked=True)
    live = LiveRequest(request("two"), plan, (0, 1))
    live.running += [Branch(live, 0, 0), Branch(live, 1, 1)]
    ticket = Ticket(live.request, plan, (0.0, 1), 0.0, live=live)
    scheduler._running.join(ticket)
    loop.branches.slots.lengths[:2] = 6
    ran = []
    while not ran or max(loop.cache.cached) < 6:
        slots, counts = scheduler._running.share()
        assert sum(counts) <= 8
        ran.append(dict(zip(slots, counts, strict=True)))
        loop.cache.cached[slots] += counts
    assert ran == [{0: 5, 1: 3}, {1: 2}, {0: 1, 1: 1}]


def test_a_budget_that_is_less_than_the_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_tokens is 3: the engine runs 4 sequences"):
        made(PaperLoop(slots=4), max_num_tokens=3)
