"""``RequestHandle``: what a user holds of a request that an executor runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any

from trtllm_core.decoding.request import Delta
from trtllm_core.errors import ConfigError
from trtllm_core.outputs import GenerationOutput

Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]
"""A coroutine that waits, and where."""


class RequestHandle:
    """Deltas as they come, and the result. For any thread, and for any number of coroutines.

    Iterating (``for`` or ``async for``) yields each delta once and ends with the request; ``result`` and ``await`` give
    its sequences, whether or not somebody iterated. All of them raise where the request was refused, or the executor
    failed; what a plugin raised is told in ``Delta.error`` and ``GenerationOutput.error``, as elsewhere.
    """

    def __init__(self, request_id: str, streaming: bool, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self._streaming = streaming
        self._cancel = cancel
        self._changed = threading.Condition(threading.Lock())
        self._deltas: deque[Delta] = deque()
        self._outputs: list[GenerationOutput] | None = None
        self._error: BaseException | None = None
        self._waiters: list[Waiter] = []

    def __repr__(self) -> str:
        return f"<RequestHandle {self.request_id!r}, {'done' if self.done else 'under way'}>"

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._outputs is not None or self._error is not None

    def cancel(self) -> None:
        """End it after the step that runs now, with ``cancelled``. What there is so far stays. Nothing once it is over.

        Returns at once.
        """
        if not self.done:
            self._cancel()

    def result(self, timeout: float | None = None) -> list[GenerationOutput]:
        """Wait for its end: its sequences, best first.

        Args:
            timeout: seconds to wait at most; the request goes on if they are over.

        Raises:
            TimeoutError: it has not ended yet.
            ConfigError, CapacityError: it was refused.
            ExecutorError: the executor failed, or was shut down.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self.done:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {self.request_id!r} has not ended within {timeout} s; it goes on")
                self._changed.wait(left)
        return self._ended()

    def __await__(self) -> Generator[Any, None, list[GenerationOutput]]:
        return self._result().__await__()

    def __iter__(self) -> Iterator[Delta]:
        self._check_streaming()
        while True:
            with self._changed:
                while not (self._deltas or self.done):
                    self._changed.wait()
                delta = self._deltas.popleft() if self._deltas else None
            if delta is None:
                self._ended()
                return
            yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        self._check_streaming()
        while True:
            with self._changed:
                delta = self._deltas.popleft() if self._deltas else None
                waiter = None if delta is not None or self.done else self._wait()
            if waiter is not None:
                await waiter
            elif delta is None:
                self._ended()
                return
            else:
                yield delta

    async def _result(self) -> list[GenerationOutput]:
        while True:
            with self._changed:
                waiter = None if self.done else self._wait()
            if waiter is None:
                return self._ended()
            await waiter

    def _wait(self) -> asyncio.Future[None]:
        """Something that is done when something is told. The lock is held."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiters.append((loop, future))
        return future

    def _ended(self) -> list[GenerationOutput]:
        if self._error is not None:
            raise self._error
        assert self._outputs is not None
        return self._outputs

    def _check_streaming(self) -> None:
        if not self._streaming:
            raise ConfigError(f"request {self.request_id!r} was submitted with streaming=False: ask for its result")

    # -- for the executor ----------------------------------------------------------------------------------------

    def tell(
        self,
        deltas: Sequence[Delta] = (),
        outputs: list[GenerationOutput] | None = None,
        error: BaseException | None = None,
    ) -> list[Waiter]:
        """Something happened. Threads that wait are woken; who must be woken in an asyncio loop is returned."""
        if not (self._streaming or outputs is not None or error is not None):
            return []
        with self._changed:
            if self._streaming:
                self._deltas.extend(deltas)
            self._outputs, self._error = outputs, error
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        return waiters


def wake(waiters: Sequence[Waiter]) -> None:
    """Wake coroutines: one call a loop. Those whose loop is closed are gone."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, future in waiters:
        loops.setdefault(loop, []).append(future)
    for loop, futures in loops.items():
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(_resolve, futures)
            except RuntimeError:  # closed in between
                continue


def _resolve(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
