"""``Executor``: requests from any thread or coroutine, run together by one worker thread."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from trtllm_core.batch_input import make_requests
from trtllm_core.config import ExecutorConfig, SamplingConfig
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.errors import CapacityError, ConfigError, ExecutorError
from trtllm_core.executor.handle import RequestHandle, Waiter, wake
from trtllm_core.generation import GenerationSession
from trtllm_core.outputs import GenerationOutput, outputs_of
from trtllm_core.plugin import LogitsProcessor, StoppingCriterion
from trtllm_core.plugin.observer import RequestStats, StepStats
from trtllm_core.prompt_table import Table
from trtllm_core.runner import ModelRunner
from trtllm_core.scheduling import Scheduler, Ticket, Turn

T = TypeVar("T")

_LENT = "an executor runs on this session: shut it down first"


class Executor:
    """Runs requests as they come, packed into the steps of one session: in-flight batching.

    All of the session's work, and all calls of plugins and observers, happen in one worker thread. The other methods
    may be called from any thread; nobody waits busily. The session itself is not closed by it, and cannot be used by
    others meanwhile. A context manager: leaving it waits for all requests; an exception that leaves it cancels them.

    Args:
        source: what generates. Its KV policy says how requests are admitted.
        config: limits; None takes the defaults.

    Raises:
        ConfigError: the session is in use, or has several ranks; or ``max_num_tokens`` is less than it has slots.
    """

    def __init__(self, source: ModelRunner | GenerationSession, config: ExecutorConfig | None = None) -> None:
        self.config = config or ExecutorConfig()
        self.generation = source.generation if isinstance(source, ModelRunner) else source
        if self.generation.config.build.tp_size > 1:
            raise ConfigError(
                "an executor runs engines of one rank: ranks must be given the same steps, which it cannot"
            )
        self._scheduler = Scheduler(
            self.generation.loop,
            self.config.max_num_tokens,
            self.config.max_batch_size,
            self.config.priority_seconds,
            keep_stats=self.config.iter_stats_max_iterations > 0,
        )
        self.generation.lend(_LENT)
        self._lock = threading.Lock()
        self._called = threading.Condition(self._lock)
        self._orders: deque[Callable[[], None]] = deque()  # for the worker, between two steps
        self._arriving = 0  # submitted, and not with the scheduler yet
        self._names = itertools.count()
        self._taken: set[str] = set()  # ids of requests that have not ended
        self._planning = threading.Lock()
        self._closing = False
        self._error: ExecutorError | None = None
        self._handles: dict[str, tuple[RequestHandle, Ticket, ExitStack]] = {}  # the worker's alone
        self._steps: deque[StepStats] = deque(maxlen=self.config.iter_stats_max_iterations)
        self._requests: deque[RequestStats] = deque(maxlen=self.config.request_stats_max_requests)
        self._worker = threading.Thread(target=self._work, name="trtllm-core executor", daemon=True)
        self._worker.start()
        atexit.register(
            self._stop, False, None
        )  # a thread that is cut off within a step would take the process with it

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int] | torch.Tensor,
        sampling_config: SamplingConfig | None = None,
        *,
        streaming: bool = True,
        priority: int = 0,
        deadline: float | None = None,
        request_id: str | None = None,
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
        text: bool = False,
        prompt_table: Table | None = None,
        prompt_task: int | None = None,
        lora_uid: str | None = None,
        **fields: Any,
    ) -> RequestHandle:
        """Queue a request. Returns at once.

        Args:
            prompt: token ids.
            sampling_config: None is the default one.
            streaming: keep deltas for whoever iterates over the handle; without, only the result is kept.
            priority: the higher starts earlier; see ``ExecutorConfig.priority_seconds``. Who runs is not interrupted.
            deadline: seconds from now after which it ends as ``timed_out``, wherever it is then.
            request_id: None gives it a number. No other request that has not ended may have it.
            stopping_criteria, logits_processor, text, prompt_table, lora_uid, fields: as for ``ModelRunner.generate``.
            prompt_task: its task in the prompt table.

        Raises:
            ConfigError, CapacityError, PluginError: it cannot work on this engine. What shows only when it starts is
                raised by its handle; the others go on either way.
            CapacityError: ``max_queue_size`` requests wait already.
            ExecutorError: the executor was shut down, or has failed.
        """
        self._check_open()
        if deadline is not None and not deadline >= 0:
            raise ConfigError(f"deadline={deadline}: give seconds from now, 0 or more")
        config = (sampling_config or SamplingConfig()).replace(**fields) if fields else sampling_config
        now = time.monotonic()
        until = None if deadline is None else now + deadline
        name = request_id if request_id is not None else self._new_name()
        request, plan = self._checked(
            name,
            prompt,
            config or SamplingConfig(),
            logits_processor,
            stopping_criteria,
            text,
            prompt_table,
            None if prompt_task is None else [prompt_task],
            None if lora_uid is None else [lora_uid],
        )
        handle = RequestHandle(name, streaming, partial(self._order, partial(self._cancel, name)))
        with self._lock:
            self._check_open()
            if self._arriving + self._scheduler.waiting >= self.config.max_queue_size:
                raise CapacityError(
                    f"{self.config.max_queue_size} requests wait already, as many as max_queue_size allows: try again "
                    "later, or raise it"
                )
            if name in self._taken:
                raise ConfigError(f"there is a request {name!r} already that has not ended: give another request_id")
            self._taken.add(name)
            use = ExitStack()
            use.enter_context(self.generation.lora.using([request.adapter]))
            self._arriving += 1
            self._orders.append(partial(self._enter, handle, request, plan, use, (priority, until, now)))
            self._called.notify()
        return handle

    def generate(
        self,
        prompts: Sequence[Sequence[int] | torch.Tensor],
        sampling_config: SamplingConfig | None = None,
        **options: Any,
    ) -> list[list[GenerationOutput]]:
        """Submit all prompts and wait for them: the sequences of each, best first. ``options`` are those of ``submit``.

        Raises:
            TrtllmCoreError: as ``submit`` and ``RequestHandle.result``; then all of them are cancelled.
        """
        handles: list[RequestHandle] = []
        try:
            handles += (self.submit(prompt, sampling_config, streaming=False, **options) for prompt in prompts)
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def _new_name(self) -> str:
        while (name := str(next(self._names))) in self._taken:
            pass
        return name

    def _checked(
        self,
        name: str,
        prompt: Any,
        config: SamplingConfig,
        processors: Any,
        criteria: Any,
        text: bool,
        table: Table | None,
        tasks: list[int] | None,
        uids: list[str] | None,
    ) -> tuple[Request, Plan]:
        """What shows that a request cannot work before it waits for anything. One at a time: plans make plugins."""
        with self._planning:
            (request,) = make_requests(
                self.generation,
                self.generation.lora,
                [prompt],
                config,
                processors,
                criteria,
                text,
                table,
                tasks,
                uids,
                deltas=True,
                ids=[name],
            )
            return request, self.generation.loop.check(request)

    # -- looking on ----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        with self._lock:
            return self._arriving + self._scheduler.waiting

    @property
    def active(self) -> int:
        """Requests that have started and not ended."""
        return self._scheduler.active

    def get_latest_iteration_stats(self) -> list[StepStats]:
        """Of the steps since the last call, the oldest first: ``iter_stats_max_iterations`` of them at most."""
        return _taken_from(self._steps)

    def get_latest_request_stats(self) -> list[RequestStats]:
        """Of the requests that ended since the last call: ``request_stats_max_requests`` of them at most."""
        return _taken_from(self._requests)

    def stages(self) -> dict[str, str]:
        """Where each request is that has not ended: ``queued``, ``context``, ``generation`` or ``paused``, by id."""
        return self.between_steps(lambda: {name: ticket.stage for name, (_, ticket, _) in self._handles.items()})

    # -- between steps -------------------------------------------------------------------------------------------

    def between_steps(self, function: Callable[[], T]) -> T:
        """Call something in the worker, between two steps, and wait for what it returns or raises.

        Raises:
            ExecutorError: the executor was shut down, or has failed.
        """
        if threading.current_thread() is self._worker:
            return function()
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        with self._lock:
            self._check_open()
            self._orders.append(call)
            self._called.notify()
        return done.result()

    def add_lora(self, uid: str, directory: Path | str) -> None:
        """As ``ModelRunner.add_lora``, between two steps."""
        self.between_steps(lambda: self.generation.lora.add(uid, directory))

    def drop_lora(self, uid: str) -> None:
        """As ``ModelRunner.drop_lora``, between two steps."""
        self.between_steps(lambda: self.generation.lora.drop(uid))

    # -- the end -------------------------------------------------------------------------------------------------

    def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; wait for those that there are, or cancel them. Twice does no harm.

        Args:
            drain: let them end as they would; False: cancel them.
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: some have not ended yet. They go on.
        """
        self._stop(drain, timeout)
        if self._worker.is_alive():
            raise TimeoutError(f"the executor still has requests after {timeout} s; they go on")
        atexit.unregister(self._stop)

    def _stop(self, drain: bool, timeout: float | None) -> None:
        with self._lock:
            self._closing = True
            if not drain:
                self._orders.append(self._cancel_all)
            self._called.notify()
        if threading.current_thread() is self._worker:
            raise ConfigError("the executor's own thread cannot wait for it to end: call shutdown from another one")
        self._worker.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.shutdown(drain=kind is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        await asyncio.to_thread(self.shutdown, drain=kind is None)

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing:
            raise ExecutorError("the executor was shut down: it takes no more requests")

    # -- the worker ----------------------------------------------------------------------------------------------

    def _order(self, order: Callable[[], None]) -> None:
        with self._lock:
            self._orders.append(order)
            self._called.notify()

    def _work(self) -> None:
        device = self.generation.device
        if device.type == "cuda" and device.index is not None:  # the current device is the thread's own
            torch.cuda.set_device(device)
        try:
            while self._next_orders():
                if self._scheduler.busy:
                    self._pass_on(self._scheduler.step())
        except BaseException as error:
            self._fail(error)
        finally:
            self.generation.take_back()

    def _next_orders(self) -> bool:
        """Wait for something to do, and carry out what was ordered. False: it is over."""
        with self._lock:
            while not (self._orders or self._scheduler.busy or self._closing):
                self._called.wait()
        while (order := self._next_order()) is not None:
            order()  # one that raises leaves the others where they are
        with self._lock:
            return bool(self._orders or self._scheduler.busy or not self._closing)

    def _next_order(self) -> Callable[[], None] | None:
        with self._lock:
            return self._orders.popleft() if self._orders else None

    def _enter(
        self, handle: RequestHandle, request: Request, plan: Plan, use: ExitStack, when: tuple[int, float | None, float]
    ) -> None:
        """``when``: priority, deadline and arrival, as for ``Scheduler.add``."""
        with self._lock:  # nobody may count it twice, or not at all
            ticket = self._scheduler.add(request, plan, *when)
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
            self._requests.append(ticket.stats)
        for name, deltas in news.items():
            waiters += self._handles[name][0].tell(deltas)
        if turn.stats is not None and self._steps.maxlen:
            self._steps.append(turn.stats)
        if waiters:
            wake(waiters)

    def _fail(self, error: BaseException) -> None:
        """The loop cannot go on. Everybody is told why, and how full the pool was."""
        told = ExecutorError(
            f"the executor stopped after step {self.generation.loop.steps}: {type(error).__name__}: {error} "
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
            usage = self.generation.loop.cache.usage()
        except Exception as error:
            return f"the KV pool does not answer: {type(error).__name__}: {error}"
        return f"KV pool: {usage.free} of {usage.total} blocks free, {usage.cached} of them kept for reuse"


def _taken_from(kept: deque[T]) -> list[T]:
    """All that is there, oldest first, while somebody may append."""
    taken = []
    with suppress(IndexError):
        while True:
            taken.append(kept.popleft())
    return taken
