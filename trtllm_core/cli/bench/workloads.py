"""The work that ``bench`` times, from what was asked for and what the engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_core.config import BuildConfig

_BATCHES, _PROMPT, _PREFILL = (1, 8), 128, 512


@dataclass(frozen=True)
class Workload:
    """What is timed: how many prompts, how long, and how many new tokens each. One new token measures prefill."""

    name: str
    batch: int
    prompt_len: int
    new_tokens: int

    @property
    def is_prefill(self) -> bool:
        """Whether reading the prompt is what counts."""
        return self.new_tokens == 1

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens, the same ones in every process."""
        return random_prompts([self.prompt_len] * self.batch, vocab_size)


def random_prompts(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """A prompt of each length, the same ones in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (sum(lengths),), generator=generator)
    return [part.tolist() for part in torch.split(ids, list(lengths))]


@dataclass(frozen=True)
class Lengths:
    """What was asked for. None is a default that is lowered to what the engine takes; what was asked for is not."""

    batches: Sequence[int] | None = None
    """To decode. Empty: nothing is decoded."""
    prompts: Sequence[int] | None = None
    outputs: Sequence[int] = (64,)
    prefills: Sequence[int] | None = None
    """Prompts that are read by themselves."""
    prefill_batches: Sequence[int] = (1,)

    def limits(self) -> dict[str, int]:
        """What an engine needs that is made for this work: fields of ``BuildConfig``."""
        batches = _BATCHES if self.batches is None else self.batches
        longest = max(self.prefills or (_PREFILL,))
        total = longest + 1
        if batches:
            prompt = max(self.prompts or (_PROMPT,))
            longest, total = max(longest, prompt), max(total, prompt + max(self.outputs))
        batch = max(*batches, *self.prefill_batches, 1)
        return {
            "max_batch_size": batch,
            "max_input_len": longest,
            "max_seq_len": total,
            "max_num_tokens": max(4096, batch),
        }

    def workloads(self, build: BuildConfig) -> list[Workload]:
        """Reading prompts, then decoding: every batch size with every prompt and every output."""
        lowered = tuple(min(size, build.max_batch_size) for size in _BATCHES)
        batches = lowered if self.batches is None else self.batches
        room = max(min(build.max_input_len, build.max_seq_len - max(self.outputs)), 1)
        prompts = self.prompts or (min(_PROMPT, room),)
        prefills = (min(_PREFILL, build.max_input_len),) if self.prefills is None else self.prefills
        several = len(prompts) * len(self.outputs) > 1
        works = [
            Workload(f"prefill {f'{batch} x ' if batch > 1 else ''}{length}", batch, length, 1)
            for batch in self.prefill_batches
            for length in prefills
        ]
        for prompt in prompts:
            for new in self.outputs:
                lengths = f", {prompt} + {new}" if several else ""
                works += [Workload(f"decode, batch {size}{lengths}", size, prompt, new) for size in batches]
        return [*dict.fromkeys(works)]
