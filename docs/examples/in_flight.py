"""Requests that come while others run: from a thread, and from coroutines. The model has no weights."""

import asyncio

from trtllm_core import BuildConfig, Executor, ExecutorConfig, ModelRunner, SamplingConfig
from trtllm_core.testing.markov import MarkovExecutable

build = BuildConfig(max_batch_size=4, max_input_len=64, max_seq_len=128, max_num_tokens=32, tokens_per_block=8)
runner = ModelRunner.from_engine(MarkovExecutable(build=build))
greedy = SamplingConfig(max_new_tokens=6, end_id=())

with Executor(runner, ExecutorConfig(max_queue_size=100)) as executor:
    handles = [executor.submit([token], greedy, request_id=f"request {token}") for token in (5, 11, 42)]
    for delta in handles[0]:  # as its tokens come
        print(delta.tokens, end=" ")
    print(delta.finish_reason)
    for handle in handles[1:]:
        (output,) = handle.result(timeout=60)
        print(output.request_id, output.tokens, output.finish_reason)

    urgent = executor.submit([7], greedy, priority=5, deadline=30.0, request_id="urgent")
    long = executor.submit([9], greedy.replace(max_new_tokens=100), request_id="long")
    long.cancel()
    print("urgent", urgent.result()[0].finish_reason)
    print("long", long.result()[0].finish_reason in ("cancelled", "length"))
steps = executor.get_latest_iteration_stats()
print("one request a step" if max(step.rows for step in steps) == 1 else "requests shared steps")


async def answer(executor: Executor, prompt: list[int]) -> list[int]:
    return [token async for delta in executor.submit(prompt, greedy) for token in delta.tokens]


async def main() -> None:
    async with Executor(runner) as executor:
        for tokens in await asyncio.gather(*(answer(executor, [token]) for token in (5, 11, 42))):
            print(tokens)
        (output,) = await executor.submit([7], greedy, streaming=False)
        print(output.finish_reason)


asyncio.run(main())
runner.close()
