"""Requests that come and go while others run."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trtllm_core import (
    BuildConfig,
    Executor,
    ExecutorConfig,
    GenerationSession,
    KVCacheConfig,
    Mapping,
    ModelRunner,
    Plugins,
    SamplingConfig,
    Session,
)
from trtllm_core.decoding.request import Request
from trtllm_core.errors import CapacityError, ConfigError, ExecutorError
from trtllm_core.plugin import DeviceLogitsProcessor, HostLogitsProcessor, HostStoppingCriterion, hookimpl
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.markov import MarkovExecutable

BUILD = BuildConfig(max_batch_size=4, max_beam_width=2, max_input_len=100, max_seq_len=128, tokens_per_block=8)
GREEDY = SamplingConfig(max_new_tokens=20, end_id=())
LONG = GREEDY.replace(max_new_tokens=100)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


class Gate(MarkovExecutable):
    """A model that runs while it is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(build=BUILD, **options)
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def execute(self, inputs, outputs, stream) -> None:
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        super().execute(inputs, outputs, stream)


Make = Callable[..., Executor]


@pytest.fixture
def make(plugins: Plugins) -> Iterator[Make]:
    made: list[Executor] = []

    def new(cache: KVCacheConfig | None = None, plugins: Plugins = plugins, **limits: Any) -> Executor:
        runner = ModelRunner.from_engine(Gate(), plugins=plugins, kv_cache=cache)
        made.append(Executor(runner, ExecutorConfig(**limits)))
        return made[-1]

    yield new
    for executor in made:
        executor.generation.session.engine.open.set()
        executor.shutdown(drain=False)


def gate(executor: Executor) -> Gate:
    return executor.generation.session.engine  # type: ignore[return-value]


def alone(prompt: list[int], config: SamplingConfig = GREEDY) -> tuple[int, ...]:
    runner = ModelRunner.from_engine(MarkovExecutable(build=BUILD))
    return runner.generate([prompt], config.replace(return_dict=True))["outputs"][0].tokens


def wait_for_start(executor: Executor) -> None:
    while executor.active == 0:
        time.sleep(0.001)


def assert_nothing_is_lost(executor: Executor) -> None:
    loop = executor.generation.loop
    assert loop.branches.slots.free == loop.branches.slots.context.slots
    usage = loop.cache.usage()
    assert usage.free == usage.total
    loop.cache.policy.check_integrity()


def test_results_streams_and_awaits_are_what_each_would_get_alone(make: Make) -> None:
    executor = make()
    prompts = [[5, 6, 7], [11], [3] * 20, [9, 8], [42, 17], [2], [1, 2]]
    handles = [executor.submit(prompt, GREEDY) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        (output,) = handle.result(30)
        assert output.tokens == alone(prompt)
        deltas = list(handle)
        assert tuple(token for delta in deltas for token in delta.tokens) == output.tokens
        assert deltas[-1].finish_reason == output.finish_reason == "length"
    executor.shutdown()
    assert_nothing_is_lost(executor)


def test_asyncio(make: Make) -> None:
    executor = make()

    async def stream(prompt: list[int]) -> tuple[int, ...]:
        return tuple([token async for delta in executor.submit(prompt, GREEDY) for token in delta.tokens])

    async def main() -> None:
        prompts = [[5], [11], [3] * 20, [9, 8], [4]]
        beats = 0

        async def heart() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0)
                beats += 1

        beating = asyncio.create_task(heart())
        streams = await asyncio.gather(*map(stream, prompts))
        assert streams == [alone(prompt) for prompt in prompts]
        (output,) = await executor.submit([5], GREEDY, streaming=False)
        assert output.tokens == streams[0]
        assert beats > 10, "the loop was not blocked"
        beating.cancel()
        with pytest.raises(ConfigError, match="temperature"):
            await executor.submit([5], temperature=-1.0)

    async def owner() -> None:
        async with executor:
            await main()

    asyncio.run(owner())
    assert_nothing_is_lost(executor)


def test_a_loop_that_is_closed_before_its_request_has_ended(make: Make) -> None:
    executor = make()
    gate(executor).open.clear()
    handles = []

    async def leave() -> None:
        handles.append(executor.submit([5], GREEDY))
        waiting = asyncio.ensure_future(handles[0]._result())
        await asyncio.sleep(0.01)
        waiting.cancel()

    asyncio.run(leave())
    gate(executor).open.set()
    assert handles[0].result(30)[0].tokens == alone([5])


def test_cancelled_wherever_it_is(make: Make) -> None:
    executor = make(max_batch_size=1)
    running, waiting = executor.submit([5], LONG), executor.submit([11], GREEDY)
    next(iter(running))
    waiting.cancel()
    assert [(o.finish_reason, o.tokens) for o in waiting.result(30)] == [("cancelled", ())]
    assert [(d.finish_reason, d.tokens) for d in waiting] == [("cancelled", ())]
    running.cancel()
    (output,) = running.result(30)
    assert output.finish_reason in ("cancelled", "length")
    assert output.tokens == alone([5], LONG)[: len(output.tokens)]
    running.cancel()  # it is over: nothing happens
    assert executor.submit([11], GREEDY).result(30)[0].tokens == alone([11])
    executor.shutdown()
    assert_nothing_is_lost(executor)


def test_deadlines_of_those_that_run_and_those_that_wait(make: Make) -> None:
    executor = make(max_batch_size=1)
    gate(executor).open.clear()
    late, never = executor.submit([5], LONG, deadline=0.05), executor.submit([5], LONG, deadline=0.01)
    fine = executor.submit([11], GREEDY, deadline=60)
    time.sleep(0.1)
    gate(executor).open.set()
    assert late.result(30)[0].finish_reason == "timed_out"
    assert len(late.result()[0].tokens) <= 1, "the step that ran when it was over"
    assert (never.result(30)[0].finish_reason, never.result()[0].tokens) == ("timed_out", ())
    assert fine.result(30)[0].tokens == alone([11])
    with pytest.raises(ConfigError, match="deadline=-1"):
        executor.submit([5], GREEDY, deadline=-1)


def test_priorities_and_a_queue_that_is_full(make: Make) -> None:
    executor = make(max_batch_size=1, max_queue_size=3)
    gate(executor).open.clear()
    first = executor.submit([5], GREEDY)
    wait_for_start(executor)
    ended: list[str] = []
    handles = [executor.submit([9], GREEDY, priority=p, request_id=f"priority {p}") for p in (0, 5, 1)]
    with pytest.raises(CapacityError, match="3 requests wait already, as many as max_queue_size allows"):
        executor.submit([9], GREEDY)
    with pytest.raises(CapacityError, match="3 requests wait already"):
        executor.submit([9], GREEDY, request_id="priority 0")
    threads = [threading.Thread(target=lambda h=h: (h.result(30), ended.append(h.request_id))) for h in handles]
    for thread in threads:
        thread.start()
    gate(executor).open.set()
    for thread in threads:
        thread.join()
    assert first.done
    order = [stats.request_id for stats in executor.get_latest_request_stats()]
    assert order == ["0", "priority 5", "priority 1", "priority 0"]
    assert sorted(ended) == sorted(order[1:])


def test_a_request_on_its_way_to_the_queue_is_counted_once(make: Make) -> None:
    executor = make(max_batch_size=1)
    gate(executor).open.clear()
    executor.submit([5], GREEDY)
    wait_for_start(executor)
    add, seen = executor._worker._scheduler.add, list[int]()

    def slow(*args: Any) -> Any:
        ticket = add(*args)
        looking = threading.Thread(target=lambda: seen.append(executor.waiting))
        looking.start()
        looking.join(0.1)  # it must wait until the request has arrived
        assert not seen
        return ticket

    executor._worker._scheduler.add = slow  # type: ignore[method-assign]
    executor.submit([9], GREEDY)
    gate(executor).open.set()
    executor.shutdown()
    assert seen[0] <= 1


def test_who_wants_only_the_result_is_told_nothing_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, told = make(), list[tuple[str, str | None]]()
    pass_on = executor._worker._pass_on

    def spy(turn: Any) -> None:
        told.extend((delta.request_id, delta.finish_reason) for delta in turn.deltas)
        pass_on(turn)

    monkeypatch.setattr(executor._worker, "_pass_on", spy)
    beams = GREEDY.replace(num_beams=2, max_new_tokens=5)
    asked = [([5], GREEDY), ([7, 8], beams), ([9], GREEDY.replace(output_log_probs=True))]
    quiet = [executor.submit(*one, streaming=False) for one in asked]
    loud = [executor.submit(*one) for one in asked]
    for one, other in zip(quiet, loud, strict=True):
        outputs, expected = one.result(30), other.result(30)
        assert [o.tokens for o in outputs] == [o.tokens for o in expected]
        assert [o.log_probs for o in outputs] == [o.log_probs for o in expected]
    names = {handle.request_id for handle in quiet}
    assert all(reason for name, reason in told if name in names)
    assert any(reason is None for name, reason in told if name not in names)


def test_ids_of_requests_are_unique_while_they_run(make: Make) -> None:
    executor = make()
    gate(executor).open.clear()
    mine = executor.submit([5], GREEDY, request_id="mine")
    with pytest.raises(ConfigError, match="there is a request 'mine' already"):
        executor.submit([5], GREEDY, request_id="mine")
    gate(executor).open.set()
    assert mine.result(30)[0].request_id == "mine"
    assert executor.submit([5], GREEDY, request_id="mine").result(30)


@pytest.mark.parametrize(
    ("prompt", "fields", "error", "words"),
    [
        ([], {}, ConfigError, "request '0' is empty"),
        ([97], {}, ConfigError, "outside the vocabulary"),
        ([1] * 90, {"max_new_tokens": 60}, CapacityError, "built for 128"),
        ([1], {"min_tokens_to_keep": 3}, ConfigError, "min_tokens_to_keep"),
        ([1], {"decoder": "nobody"}, LookupError, "nobody"),
        ([1], {"lora_uid": "x"}, ConfigError, "no adapter 'x'"),
        ([1], {"text": True}, ConfigError, "no tokenizer"),
        ([1], {"max_attention_window_size": 8}, ConfigError, "window"),
    ],
)
def test_what_cannot_work_is_refused_alone(make: Make, prompt, fields, error, words) -> None:
    executor = make()
    good = executor.submit([5], LONG, request_id="good")
    with pytest.raises(error, match=words):
        executor.submit(prompt, GREEDY, **fields)
    assert good.result(30)[0].tokens == alone([5], LONG)
    executor.shutdown()
    assert_nothing_is_lost(executor)


class RefusesSome(HostLogitsProcessor):
    """Finds only when it begins that it cannot help."""

    def start(self, view):
        if view.prompt == (13,):
            raise ConfigError("not with this prompt")
        return 0

    def process(self, state, tokens, logits):
        return None


class Raises(DeviceLogitsProcessor):
    """Fails when its branch has 8 tokens."""

    def apply(self, logits, batch):
        if bool((batch.active & (batch.context.lengths[batch.slot] >= 8)).any()):
            raise ZeroDivisionError("oops")


class BadStop(HostStoppingCriterion):
    def check(self, state, tokens, new):
        raise ValueError("stop")


def test_what_shows_at_the_start_is_raised_by_the_handle(make: Make) -> None:
    executor = make()
    handles = [executor.submit(p, GREEDY, logits_processor=RefusesSome()) for p in ([5], [13], [11])]
    with pytest.raises(ConfigError, match="not with this prompt"):
        handles[1].result(30)
    with pytest.raises(ConfigError, match="not with this prompt"):
        list(handles[1])
    assert [handles[i].result(30)[0].tokens for i in (0, 2)] == [alone([5]), alone([11])]
    executor.shutdown()
    assert [s.finish_reason for s in executor.get_latest_request_stats()].count("refused") == 1
    assert_nothing_is_lost(executor)


def test_a_plugin_that_fails_ends_its_own_requests(make: Make) -> None:
    executor = make()
    bad = [executor.submit([5], LONG, logits_processor=Raises()), executor.submit([5], stopping_criteria=BadStop())]
    good = executor.submit([5], LONG)
    assert [h.result(30)[0].finish_reason for h in bad] == ["plugin_error"] * 2
    assert "Raises" in str(bad[0].result()[0].error)
    assert list(bad[0])[-1].error is bad[0].result()[0].error
    assert good.result(30)[0].tokens == alone([5], LONG)
    executor.shutdown()
    assert_nothing_is_lost(executor)


def test_a_backend_that_fails_stops_the_executor_and_everybody_is_told(make: Make) -> None:
    executor = make(max_batch_size=2)
    gate(executor).open.clear()
    handles = [executor.submit([token], GREEDY) for token in (5, 6, 7, 8)]
    gate(executor).error = OSError("the device is gone")
    gate(executor).open.set()
    words = r"the executor stopped after step 0: OSError: the device is gone \(KV pool: \d+ of \d+ blocks free"
    for handle in handles:
        with pytest.raises(ExecutorError, match=words) as caught:
            handle.result(30)
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(ExecutorError):
            list(handle)
    with pytest.raises(ExecutorError, match="the device is gone"):
        executor.submit([5], GREEDY)
    with pytest.raises(ExecutorError, match="the device is gone"):
        executor.stages()
    executor.shutdown()
    gate(executor).error = None
    assert_nothing_is_lost(executor)


@pytest.mark.parametrize("verb", ["admit", "extend", "release", "usage"])
def test_a_kv_policy_that_fails_stops_it_too(make: Make, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make()
    policy = executor.generation.loop.cache.policy

    def fails(*arguments: Any, **more: Any) -> None:
        raise RuntimeError(f"no {verb} today")

    monkeypatch.setattr(policy, verb, fails)
    with pytest.raises(ExecutorError, match=f"no {verb} today"):
        executor.submit([5], GREEDY).result(30)


def test_shutdown_drains_or_cancels(make: Make) -> None:
    draining, cancelling = make(max_batch_size=1), make(max_batch_size=1)
    for executor, drain in ((draining, True), (cancelling, False)):
        gate(executor).open.clear()
        handles = [executor.submit([5], GREEDY) for _ in range(3)]
        wait_for_start(executor)
        with pytest.raises(TimeoutError, match="the executor still has requests after 0.01 s"):
            executor.shutdown(drain=drain, timeout=0.01)
        with pytest.raises(ExecutorError, match="was shut down: it takes no more requests"):
            executor.submit([5], GREEDY)
        gate(executor).open.set()
        executor.shutdown(drain=drain)
        reasons = {handle.result(0)[0].finish_reason for handle in handles}
        assert reasons == ({"length"} if drain else {"cancelled"})
        assert_nothing_is_lost(executor)


def test_leaving_its_block_drains_unless_an_exception_does(plugins: Plugins) -> None:
    runner = ModelRunner.from_engine(MarkovExecutable(build=BUILD), plugins=plugins)
    with Executor(runner) as executor:
        handle = executor.submit([5], LONG)
        with pytest.raises(ConfigError, match="an executor runs on this session: shut it down first"):
            runner.generate([[5]], GREEDY)
        with pytest.raises(ConfigError, match="an executor runs on this session"):
            Executor(runner)
    assert handle.result(0)[0].finish_reason == "length"
    assert runner.generate([[5]], GREEDY).shape == (1, 1, 21), "the session is free again"
    handles = []

    def fails(executor: Executor) -> None:
        with executor:
            handles.extend(executor.submit([5], LONG, streaming=False) for _ in range(30))
            raise KeyError

    with pytest.raises(KeyError):
        fails(Executor(runner))
    assert {one.result(0)[0].finish_reason for one in handles} >= {"cancelled"}
    with pytest.raises(ConfigError, match="streaming=False: ask for its result"):
        next(iter(handles[0]))


def test_a_program_may_end_without_shutting_it_down() -> None:
    script = """
from trtllm_core import Executor, ModelRunner
from trtllm_core.scheduling import Scheduler
from trtllm_core.testing.markov import MarkovExecutable

executor = Executor(ModelRunner.from_engine(MarkovExecutable()))
handles = [executor.submit([5], max_new_tokens=100, end_id=()) for _ in range(200)]
print(next(iter(handles[0])).tokens)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"({alone([5])[0]},)\n", "")


def test_its_own_thread_cannot_wait_for_its_end(make: Make) -> None:
    executor = make()
    with pytest.raises(ConfigError, match="call shutdown from another one"):
        executor.between_steps(executor.shutdown)


def test_result_waits_no_longer_than_asked(make: Make) -> None:
    executor = make()
    gate(executor).open.clear()
    handle = executor.submit([5], GREEDY)
    with pytest.raises(TimeoutError, match="request '0' has not ended within 0.01 s"):
        handle.result(0.01)
    gate(executor).open.set()
    assert handle.result(30)[0].finish_reason == "length"


def test_generate_is_the_batch_of_it(make: Make) -> None:
    executor = make()
    outputs = executor.generate([[5], torch.tensor([11]), [3] * 20], GREEDY, num_return_sequences=2, top_k=3)
    assert [len(one) for one in outputs] == [2, 2, 2]
    with pytest.raises(ConfigError, match="empty"):
        executor.generate([[5], []], GREEDY)
    assert executor.generate([[5]], GREEDY)[0][0].tokens == alone([5])


def test_statistics_of_steps_and_requests(plugins: Plugins, make: Make) -> None:
    steps: list[Any] = []
    ends: list[Any] = []

    class Watches:
        hook_api = "observer>=1.1,<2"

        @hookimpl
        def trtllm_on_step_end(self, stats: Any) -> None:
            steps.append(stats)

        @hookimpl
        def trtllm_on_request_end(self, stats: Any) -> None:
            ends.append(stats)

    executor = make(plugins=Plugins.load(extra=[Watches()]), max_batch_size=2, max_num_tokens=16)
    gate(executor).open.clear()
    blocker = executor.submit([9], GREEDY.replace(max_new_tokens=1), request_id="blocker")
    wait_for_start(executor)
    handles = [executor.submit([token] * 20, GREEDY.replace(max_new_tokens=3)) for token in (5, 6, 7)]
    time.sleep(0.002)
    stages: dict[str, str] = {}
    asked = threading.Thread(target=lambda: stages.update(executor.stages()))
    asked.start()
    while not (
        executor._worker._orders and type(executor._worker._orders[-1]).__name__ == "function"
    ):  # no request's arrival
        time.sleep(0.001)
    gate(executor).open.set()
    for handle in handles:
        handle.result(30)
    asked.join()
    assert stages == dict.fromkeys("012", "queued"), "between the first step and the second"
    assert blocker.done
    executor.shutdown()
    assert executor.get_latest_iteration_stats() == steps
    assert executor.get_latest_request_stats() == ends
    assert ends.pop(0).request_id == "blocker"
    assert executor.get_latest_iteration_stats() == []
    assert sum(one.context_tokens for one in steps) == 1 + 60
    assert sum(one.generation_tokens for one in steps) == 6, "the last token of each is not run"
    assert all(one.context_tokens + one.generation_tokens <= 16 for one in steps)
    assert all(one.active_requests <= one.max_active_requests == 2 for one in steps)
    assert sum(one.new_requests for one in steps) == sum(one.completed_requests for one in steps) == 4
    assert {one.tokens_per_block for one in steps} == {8}
    assert all(0 <= one.kv_blocks_free <= one.kv_blocks_total for one in steps)
    last = steps[-1]
    assert (last.queued_requests, last.active_requests, last.paused_requests) == (0, 0, 0)
    assert (last.generation_requests, last.context_requests, last.rows) == (1, 0, 1)
    for one in ends:
        assert 0 <= one.queue_seconds <= one.first_token_seconds <= one.seconds
    assert [one.queue_seconds > 0.001 for one in ends] == [True] * 3, "it counts from the call of submit"


def test_statistics_are_not_kept_where_nobody_wants_them(make: Make) -> None:
    executor = make(iter_stats_max_iterations=0, request_stats_max_requests=0)
    executor.generate([[5]], GREEDY)
    executor.shutdown()
    assert (executor.get_latest_iteration_stats(), executor.get_latest_request_stats()) == ([], [])


def test_between_steps_runs_in_the_worker(make: Make) -> None:
    executor = make()
    assert executor.between_steps(lambda: threading.current_thread().name) == "trtllm-core executor"
    assert executor.between_steps(lambda: executor.between_steps(lambda: 5)) == 5
    with pytest.raises(ZeroDivisionError):
        executor.between_steps(lambda: 1 / 0)  # its own error, and nobody else's
    with pytest.raises(ConfigError, match="not built for LoRA"):
        executor.add_lora("0", "nowhere")
    assert executor.generate([[5]], GREEDY)


def test_several_ranks_are_refused(plugins: Plugins) -> None:
    session = Session.from_engine(MarkovExecutable(build=BUILD.replace(tp_size=2)))
    generation = GenerationSession(None, session, Mapping(world_size=2, tp_size=2), plugins=plugins)
    with pytest.raises(ConfigError, match="engines of one rank"):
        Executor(generation)


def test_a_search_that_is_cancelled_before_it_begins_has_all_of_its_sequences(make: Make) -> None:
    """In the queue, and when it has its slots and no token yet."""
    beams = GREEDY.replace(num_beams=2)
    executor = make(max_batch_size=1)
    gate(executor).open.clear()
    handles = [executor.submit([5], beams) for _ in range(2)]
    wait_for_start(executor)
    for handle in handles:
        handle.cancel()
    gate(executor).open.set()
    for handle in handles:
        assert [one.finish_reason for one in handle.result(30)] == ["cancelled"] * 2
    loop = executor.generation.loop
    executor.shutdown()
    scheduler = Scheduler(loop)
    request = Request("0", (1, 2), beams)
    ticket = scheduler.add(request, loop.check(request))
    scheduler._start()
    scheduler.end(ticket, "cancelled")
    assert [(one.tokens, one.reason) for one in ticket.live.sequences] == [((), "cancelled")] * 2
    assert sorted(delta.sequence for delta in scheduler.step().deltas) == [0, 1]
    assert_nothing_is_lost(executor)
