"""transformers' continuous batching as the peer of ``--mode throughput``."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from trtllm_core.cli.bench.peers import PeerSource, TransformersPeer
from trtllm_core.cli.bench.serving import Served
from trtllm_core.cli.bench.timing import gaps
from trtllm_core.cli.bench.trace import Trace
from trtllm_core.cli.bench.workloads import random_prompts
from trtllm_core.errors import BackendError, ConfigError

_PAGE = 256
"""Tokens of its cache's blocks: its own default."""
_PATIENCE = 1.0


class ContinuousPeer:
    """A server that runs until ``close``; between two traces it waits without work."""

    def __init__(self, source: PeerSource, device: str, trace: Trace, slots: int) -> None:
        peer = TransformersPeer(source, device)
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self.name = f"{peer.name}, continuous batching"
        self._model = peer.model
        prompt, new = max(one.prompt_len for one in trace.requests), max(one.new_tokens for one in trace.requests)
        # On a CPU its cache takes most of the memory unless it is told otherwise. On a GPU its own choice counts.
        blocks = (slots + 1) * -(-(prompt + new) // _PAGE) if device == "cpu" else None
        config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
        self._close = ExitStack()
        self._manager: Any = self._close.enter_context(
            self._model.continuous_batching_context_manager(
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks),
                workload_hints=WorkloadHints(prompt, new, len(trace.requests)),
                timeout=5,
            )
        )
        attention = self._model.config._attn_implementation
        if device != "cpu" and "flash" not in attention:
            self.close()
            raise ConfigError(
                f"transformers' continuous batching found no flash attention here (it would use {attention}), and "
                "without it comparing means nothing: install flash-attn"
            )

    def serve(self, trace: Trace) -> Served:
        """Run the requests, greedy, each to its length.

        Raises:
            BackendError: it stopped, or a request came out shorter or longer.
        """
        prompts = random_prompts([one.prompt_len for one in trace.requests], self._model.config.vocab_size)
        start, asked = time.perf_counter(), {}
        for prompt, request in zip(prompts, trace.requests, strict=True):
            ahead = start + request.arrival - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            name = self._manager.add_request(
                prompt, max_new_tokens=request.new_tokens, record_timestamps=True, eos_token_id=-1
            )
            asked[name] = request.new_tokens
        done = [self._next() for _ in asked]
        seconds = time.perf_counter() - start
        for one in done:
            if one.error or len(one.generated_tokens) != asked[one.request_id]:
                raise BackendError(f"{self.name} did not do a request as asked: it cannot be compared ({one.error})")
        return Served(
            seconds,
            tuple(one.timestamps[0] - one.created_time for one in done),
            gaps([one.timestamps for one in done]),
            sum(len(one.generated_tokens) for one in done),
        )

    def close(self) -> None:
        """Stop the server."""
        self._close.close()

    def _next(self) -> Any:
        """The next request that has ended."""
        while True:
            result = self._manager.get_result(timeout=_PATIENCE)
            if result is not None and result.is_finished():
                return result
            if not self._manager.is_running():
                raise BackendError(f"{self.name} stopped")
