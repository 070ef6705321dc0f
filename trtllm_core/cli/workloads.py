"""The work that ``bench`` times, from what was asked for and what the engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_core.cli.measure import Workload

if TYPE_CHECKING:
    from trtllm_core.config import BuildConfig

_BATCHES, _PROMPT, _PREFILL = (1, 8), 128, 512


@dataclass(frozen=True)
class Lengths:
    """What was asked for. None is a default that is lowered to what the engine takes; what was asked for is not."""

    batches: Sequence[int] | None
    prompt_len: int | None
    new_tokens: int
    prefill_len: int | None

    def limits(self) -> dict[str, int]:
        """What an engine needs that is made for this work: fields of ``BuildConfig``."""
        prompt, prefill = self.prompt_len or _PROMPT, self.prefill_len or _PREFILL
        batch = max(self.batches or _BATCHES)
        longest = max(prompt, prefill)
        return {
            "max_batch_size": batch,
            "max_input_len": longest,
            "max_seq_len": max(prompt + self.new_tokens, longest + 1),
            "max_num_tokens": max(4096, batch),
        }

    def workloads(self, build: BuildConfig) -> list[Workload]:
        """Reading a prompt, then decoding at each batch size."""
        sizes = self.batches or tuple(min(size, build.max_batch_size) for size in _BATCHES)
        room = min(build.max_input_len, build.max_seq_len - self.new_tokens)
        prompt = self.prompt_len or max(min(_PROMPT, room), 1)
        prefill = self.prefill_len or min(_PREFILL, build.max_input_len)
        decodes = [Workload(f"decode, batch {size}", size, prompt, self.new_tokens) for size in dict.fromkeys(sizes)]
        return [Workload(f"prefill {prefill}", 1, prefill, 1), *decodes]
