"""Hooks that watch: sessions, steps and requests, in numbers."""

from __future__ import annotations

from trtllm_core.plugin.markers import hookspec
from trtllm_core.plugin.observer import RequestStats, SessionStats, StepStats


class ObserverSpecs:
    """Hooks of kind ``observer``."""

    @hookspec
    def trtllm_on_session_start(self, stats: SessionStats) -> None:
        """A session is loaded, its cache is allocated, and its first step comes next.

        Called: once a session, in the process and thread that runs the session's loop.

        Result: notification. Return values are ignored.

        Tensors: none. ``stats`` is frozen and holds plain numbers and names.

        Returns: None.

        Raises: nothing that reaches the loop: an exception is logged once and counted in the plugin's report.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. Observers do not see each other.

        .. versionadded:: observer 1.0

        Example::

            from trtllm_core.plugin import SessionStats, hookimpl

            hook_api = "observer>=1.0,<2"


            @hookimpl
            def trtllm_on_session_start(stats: SessionStats) -> None:
                print(f"{stats.family} on {stats.backend}: {stats.weight_bytes} bytes of weights")
        """

    @hookspec
    def trtllm_on_step_end(self, stats: StepStats) -> None:
        """A step is over: the engine ran once and the tokens were chosen.

        Called: once a step, in the process and thread that runs the session's loop, which waits for it: return within
        microseconds, and hand slow work to a thread. ``Plugins.observes_steps`` is False when no plugin
        implements this hook, and the loop then does not even make the statistics. The fields that say how many
        requests wait, run and end are there since observer 1.1.

        Result: notification. Return values are ignored.

        Tensors: none. ``stats`` is frozen and holds plain numbers; on CUDA the device may still be running the step.

        Returns: None.

        Raises: nothing that reaches the loop: an exception is logged once and counted in the plugin's report.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. Observers do not see each other.

        .. versionadded:: observer 1.0

        Example::

            from trtllm_core.plugin import StepStats, hookimpl


            class Counter:
                hook_api = "observer>=1.0,<2"

                def __init__(self) -> None:
                    self.tokens = 0

                @hookimpl
                def trtllm_on_step_end(self, stats: StepStats) -> None:
                    self.tokens += stats.generation_tokens


            plugin = Counter()  # state lives in an instance, which the entry point names
        """

    @hookspec
    def trtllm_on_request_end(self, stats: RequestStats) -> None:
        """A request is over, whatever the reason: finished, cancelled, refused, or failed with a plugin.

        Called: once a request, in the process and thread that runs the session's loop, after its last token was
        chosen; also for one that ended before it started. Its times are there since observer 1.1.

        Result: notification. Return values are ignored.

        Tensors: none. ``stats`` is frozen; ``stats.plugin_seconds`` is also in the result: change nothing in it.

        Returns: None.

        Raises: nothing that reaches the loop: an exception is logged once and counted in the plugin's report.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. Observers do not see each other.

        .. versionadded:: observer 1.0

        Example::

            from trtllm_core.plugin import RequestStats, hookimpl

            hook_api = "observer>=1.0,<2"


            @hookimpl
            def trtllm_on_request_end(stats: RequestStats) -> None:
                print(f"{stats.request_id}: {stats.generated_tokens} tokens, {stats.finish_reason}")
        """

    @hookspec
    def trtllm_on_session_end(self, stats: SessionStats) -> None:
        """A session is closed: no step follows. Flush what you have gathered.

        Called: once a session, when it is closed, in the process and thread that closes it.

        Result: notification. Return values are ignored.

        Tensors: none. ``stats`` is frozen and holds plain numbers and names.

        Returns: None.

        Raises: nothing that reaches the loop: an exception is logged once and counted in the plugin's report.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. Observers do not see each other.

        .. versionadded:: observer 1.0

        Example::

            from trtllm_core.plugin import SessionStats, hookimpl

            hook_api = "observer>=1.0,<2"


            @hookimpl
            def trtllm_on_session_end(stats: SessionStats) -> None:
                print(f"{stats.family} is closed")
        """
