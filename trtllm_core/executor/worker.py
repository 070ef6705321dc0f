"""``Worker``: the thread that runs requests. It alone touches the scheduler, and with it the loop and the plugins."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from trtllm_core.config import ExecutorConfig
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.errors import CapacityError, ConfigError, ExecutorError
from trtllm_core.executor.handle import RequestHandle, Waiter, wake
from trtllm_core.generation import GenerationSession
from trtllm_core.outputs import outputs_of
from trtllm_core.plugin.observer import RequestStats, StepStats
from trtllm_core.scheduling import Scheduler, Ticket, Turn

T = TypeVar("T")

Order = Callable[[], None]
"""Something to do between two steps."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request on its way to the scheduler."""

    request: Request
    plan: Plan
    priority: int
    deadline: float | None
    """A moment of the scheduler's clock."""
    moment: float
    """When it was submitted."""


class Worker:
    """Does what it is ordered to do, and steps while there is anything to run. It starts at once.

    All methods may be called from any thread. The session is lent to it, and is taken back when the thread ends.

    Args:
        generation: whose requests.
        scheduler: of its loop.
        config: how many may wait, and how many statistics are kept.
    """

    def __init__(self, generation: GenerationSession, scheduler: Scheduler, config: ExecutorConfig) -> None:
        self._generation = generation
        self._scheduler = scheduler
        self._most = config.max_queue_size
        self._lock = threading.Lock()
        self._called = threading.Condition(self._lock)
        self._orders: deque[Order] = deque()
        self._arriving = 0  # submitted, and not with the scheduler yet
        self._taken: set[str] = set()  # ids of requests that have not ended
        self._closing = False
        self._error: ExecutorError | None = None
        self._handles: dict[str, tuple[RequestHandle, Ticket, ExitStack]] = {}  # the thread's alone
        self.steps: deque[StepStats] = deque(maxlen=config.iter_stats_max_iterations)
        """Statistics of the last steps, the oldest first."""
        self.requests: deque[RequestStats] = deque(maxlen=config.request_stats_max_requests)
        """Of the last requests that ended."""
        self._thread = threading.Thread(target=self._work, name="trtllm-core executor", daemon=True)
        self._thread.start()
        # A thread that is cut off within a step would take the process with it.
        atexit.register(self.stop, False, None)

    # -- for others ----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        with self._lock:
            return self._arriving + self._scheduler.waiting

    @property
    def active(self) -> int:
        """Requests that have started and not ended."""
        return self._scheduler.active

    @property
    def idle(self) -> bool:
        """Whether nothing has been left behind: no request, no id, no order."""
        with self._lock:
            return not (self._arriving or self._orders or self._taken or self._handles or self._scheduler.busy)

    def check_open(self) -> None:
        """Refuse to go on where it takes no more requests.

        Raises:
            ExecutorError: it was stopped, or has failed.
        """
        if self._error is not None:
            raise self._error
        if self._closing:
            raise ExecutorError("the executor was shut down: it takes no more requests")

    def is_taken(self, name: str) -> bool:
        """Whether a request of this id has not ended."""
        return name in self._taken

    def submit(self, arrival: Arrival, streaming: bool) -> RequestHandle:
        """Queue a request.

        Raises:
            CapacityError: as many wait as may.
            ConfigError: one of its id has not ended.
            ExecutorError: see ``check_open``.
        """
        name = arrival.request.request_id
        handle = RequestHandle(name, streaming, partial(self.order, partial(self._cancel, name)))
        with self._lock:
            self.check_open()
            if self._arriving + self._scheduler.waiting >= self._most:
                raise CapacityError(
                    f"{self._most} requests wait already, as many as max_queue_size allows: try again later, or raise "
                    "it"
                )
            if name in self._taken:
                raise ConfigError(f"there is a request {name!r} already that has not ended: give another request_id")
            self._taken.add(name)
            use = ExitStack()
            use.enter_context(self._generation.lora.using([arrival.request.adapter]))
            self._arriving += 1
            self._orders.append(partial(self._enter, handle, arrival, use))
            self._called.notify()
        return handle

    def order(self, order: Order) -> None:
        """Have something done before the next step. Nobody waits for it. What it raises stops everything."""
        with self._lock:
            self._orders.append(order)
            self._called.notify()

    def call(self, function: Callable[[], T]) -> T:
        """Have something done before the next step, and wait for what it returns or raises.

        Raises:
            ExecutorError: see ``check_open``.
        """
        if threading.current_thread() is self._thread:
            return function()
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        with self._lock:
            self.check_open()
            self._orders.append(call)
            self._called.notify()
        return done.result()

    def stages(self) -> dict[str, str]:
        """Of each request that has not ended, ``Ticket.stage``, by id."""
        return self.call(lambda: {name: ticket.stage for name, (_, ticket, _) in self._handles.items()})

    def stop(self, drain: bool, timeout: float | None) -> bool:
        """Take no more requests, cancel those that there are unless ``drain``, and wait. Returns whether all ended.

        Raises:
            ConfigError: the thread would wait for itself.
        """
        with self._lock:
            self._closing = True
            if not drain:
                self._orders.append(self._cancel_all)
            self._called.notify()
        if threading.current_thread() is self._thread:
            raise ConfigError("the executor's own thread cannot wait for it to end: call shutdown from another one")
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        atexit.unregister(self.stop)
        return True

    # -- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        device = self._generation.device
        if device.type == "cuda" and device.index is not None:  # the current device is the thread's own
            torch.cuda.set_device(device)
        try:
            while self._next_orders():
                if self._scheduler.busy:
                    self._pass_on(self._scheduler.step())
        except BaseException as error:
            self._fail(error)
        finally:
            self._generation.take_back()

    def _next_orders(self) -> bool:
        """Wait for something to do, and carry out what was ordered. False: it is over."""
        with self._lock:
            while not (self._orders or self._scheduler.busy or self._closing):
                self._called.wait()
        while (order := self._next_order()) is not None:
            order()  # one that raises leaves the others where they are
        with self._lock:
            return bool(self._orders or self._scheduler.busy or not self._closing)

    def _next_order(self) -> Order | None:
        with self._lock:
            return self._orders.popleft() if self._orders else None

    def _enter(self, handle: RequestHandle, new: Arrival, use: ExitStack) -> None:
        with self._lock:  # nobody may count it twice, or not at all
            ticket = self._scheduler.add(new.request, new.plan, new.priority, new.deadline, new.moment)
            self._arriving -= 1
        self._handles[handle.request_id] = handle, ticket, use

    def _cancel(self, name: str) -> None:
        if name in self._handles:
            self._scheduler.end(self._handles[name][1], "cancelled")

    def _cancel_all(self) -> None:
        for _, ticket, _ in self._handles.values():
            self._scheduler.end(ticket, "cancelled")

    def _pass_on(self, turn: Turn) -> None:
        """Tell the handles, and keep the statistics."""
        waiters: list[Waiter] = []
        news: dict[str, list[Delta]] = {}
        for delta in turn.deltas:
            news.setdefault(delta.request_id, []).append(delta)
        for ticket in turn.ended:
            name = ticket.request.request_id
            handle, _, use = self._handles.pop(name)
            with self._lock:
                use.close()
                self._taken.discard(name)
            deltas = news.pop(name, ())
            if ticket.error is not None:
                waiters += handle.tell(deltas, error=ticket.error)
            else:
                assert ticket.live is not None
                waiters += handle.tell(deltas, outputs_of(ticket.live))
            assert ticket.stats is not None
            self.requests.append(ticket.stats)
        for name, deltas in news.items():
            waiters += self._handles[name][0].tell(deltas)
        self.steps += turn.stats
        if waiters:
            wake(waiters)

    def _fail(self, error: BaseException) -> None:
        """The loop cannot go on. Everybody is told why, and how full the pool was."""
        told = ExecutorError(
            f"the executor stopped after step {self._generation.loop.steps}: {type(error).__name__}: {error} "
            f"({self._pool()}, {self._scheduler.active} requests active, {self.waiting} waiting)"
        )
        told.__cause__ = error
        with suppress(Exception):
            self._scheduler.close()
        with self._lock:
            self._error, self._closing = told, True
        while (order := self._next_order()) is not None:  # requests that were on their way
            with suppress(Exception):
                order()
        waiters: list[Waiter] = []
        for handle, _, use in self._handles.values():
            use.close()
            waiters += handle.tell(error=told)
        self._handles.clear()
        wake(waiters)

    def _pool(self) -> str:
        try:
            usage = self._generation.loop.cache.usage()
        except Exception as error:
            return f"the KV pool does not answer: {type(error).__name__}: {error}"
        return f"KV pool: {usage.free} of {usage.total} blocks free, {usage.cached} of them kept for reuse"
