"""``Executor``: requests from any thread or coroutine, run together by one worker thread."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from trtllm_core.batch_input import make_requests
from trtllm_core.config import ExecutorConfig, SamplingConfig
from trtllm_core.errors import ConfigError
from trtllm_core.executor.handle import RequestHandle
from trtllm_core.executor.worker import Arrival, Worker
from trtllm_core.generation import GenerationSession
from trtllm_core.outputs import GenerationOutput
from trtllm_core.plugin import LogitsProcessor, StoppingCriterion
from trtllm_core.plugin.observer import RequestStats, StepStats
from trtllm_core.prompt_table import Table
from trtllm_core.runner import ModelRunner
from trtllm_core.scheduling import Scheduler

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
        scheduler = Scheduler(
            self.generation.loop,
            self.config.max_num_tokens,
            self.config.max_batch_size,
            self.config.priority_seconds,
            keep_stats=self.config.iter_stats_max_iterations > 0,
        )
        self._names = itertools.count()
        self._planning = threading.Lock()
        self.generation.lend(_LENT)
        self._worker = Worker(self.generation, scheduler, self.config)

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
        self._worker.check_open()
        if deadline is not None and not deadline >= 0:
            raise ConfigError(f"deadline={deadline}: give seconds from now, 0 or more")
        config = (sampling_config or SamplingConfig()).replace(**fields) if fields else sampling_config
        now = time.monotonic()
        with self._planning:  # one at a time: plans make plugins
            (request,) = make_requests(
                self.generation,
                self.generation.lora,
                [prompt],
                config or SamplingConfig(),
                logits_processor,
                stopping_criteria,
                text,
                prompt_table,
                None if prompt_task is None else [prompt_task],
                None if lora_uid is None else [lora_uid],
                deltas=True,
                ids=[request_id if request_id is not None else self._new_name()],
                streaming=streaming,
            )
            plan = self.generation.loop.check(request)
        until = None if deadline is None else now + deadline
        return self._worker.submit(Arrival(request, plan, priority, until, now), streaming)

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
        while self._worker.is_taken(name := str(next(self._names))):
            pass
        return name

    # -- looking on ----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return self._worker.waiting

    @property
    def active(self) -> int:
        """Requests that have started and not ended."""
        return self._worker.active

    def get_latest_iteration_stats(self) -> list[StepStats]:
        """Of the steps since the last call, the oldest first: ``iter_stats_max_iterations`` of them at most."""
        return _taken_from(self._worker.steps)

    def get_latest_request_stats(self) -> list[RequestStats]:
        """Of the requests that ended since the last call: ``request_stats_max_requests`` of them at most."""
        return _taken_from(self._worker.requests)

    def stages(self) -> dict[str, str]:
        """Where each request is that has not ended: ``queued``, ``context``, ``generation`` or ``paused``, by id."""
        return self._worker.stages()

    # -- between steps -------------------------------------------------------------------------------------------

    def between_steps(self, function: Callable[[], T]) -> T:
        """Call something in the worker, between two steps, and wait for what it returns or raises.

        Raises:
            ExecutorError: the executor was shut down, or has failed.
        """
        return self._worker.call(function)

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
        if not self._worker.stop(drain, timeout):
            raise TimeoutError(f"the executor still has requests after {timeout} s; they go on")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.shutdown(drain=kind is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        await asyncio.to_thread(self.shutdown, drain=kind is None)


def _taken_from(kept: deque[T]) -> list[T]:
    """All that is there, oldest first, while somebody may append."""
    taken = []
    with suppress(IndexError):
        while True:
            taken.append(kept.popleft())
    return taken
