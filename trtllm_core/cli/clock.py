"""What a run cost, watched through the hooks that observers have."""

from __future__ import annotations

from trtllm_core.plugin import hookimpl
from trtllm_core.plugin.observer import StepStats


class StepClock:
    """An observer that adds up the time of steps that read prompts apart from the time of those that only generate."""

    hook_api = "observer>=1.0,<2"

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.prompt_seconds = 0.0
        self.tokens = 0
        self.seconds = 0.0
        self.batches = 0
        """Runs of steps that read prompts: one for each batch."""
        self._reading = False

    @hookimpl
    def trtllm_on_step_end(self, stats: StepStats) -> None:
        """Add a step."""
        reading = stats.context_tokens > 0
        self.batches += reading and not self._reading
        self._reading = reading
        if reading:
            self.prompt_tokens += stats.context_tokens
            self.prompt_seconds += stats.seconds
        else:
            self.tokens += stats.generation_tokens
            self.seconds += stats.seconds

    def lines(self) -> list[tuple[str, str]]:
        """Times and rates for people."""
        first = self.prompt_seconds / max(self.batches, 1)
        rate = self.tokens / self.seconds if self.seconds else 0.0
        prompts = self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0
        return [
            (
                "time to first token",
                f"{first:.3f} s" + (f", mean of {self.batches} batches" if self.batches > 1 else ""),
            ),
            ("prefill", f"{self.prompt_tokens} tokens in {self.prompt_seconds:.3f} s: {prompts:.1f} tokens/s"),
            ("decode", f"{self.tokens} tokens in {self.seconds:.3f} s: {rate:.1f} tokens/s"),
        ]
