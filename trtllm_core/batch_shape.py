"""``BatchShape``: what ``setup`` promises of the next batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_core.config import BuildConfig, SamplingConfig
from trtllm_core.errors import CapacityError, ConfigError


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Sizes, by the names of ``setup``'s arguments. ``decode`` may use less."""

    batch_size: int
    max_context_length: int
    max_new_tokens: int
    beam_width: int

    def check(self, build: BuildConfig) -> None:
        """Hold it against an engine's limits.

        Raises:
            CapacityError: the engine was not built for that much.
        """
        length = self.max_context_length + self.max_new_tokens
        for name, asked, most in (
            ("batch_size", self.batch_size, build.max_batch_size),
            ("beam_width", self.beam_width, build.max_beam_width),
            ("max_context_length", self.max_context_length, build.max_input_len),
            ("max_context_length + max_new_tokens", length, build.max_seq_len),
        ):
            if not 1 <= asked <= most:
                raise CapacityError(f"{name} is {asked}; the engine was built for 1 to {most}")

    def check_batch(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingConfig]) -> None:
        """Hold a batch against it.

        Raises:
            ConfigError: it is another batch than was promised.
        """
        wanted, longest = max(config.max_new_tokens for config in sampling), max(map(len, prompts))
        if len(prompts) != self.batch_size or longest > self.max_context_length or wanted > self.max_new_tokens:
            raise ConfigError(
                f"setup was for {self.batch_size} sequences of up to {self.max_context_length} + "
                f"{self.max_new_tokens} tokens; decode got {len(prompts)} of up to {longest} + {wanted}"
            )
        width = max(config.num_beams for config in sampling)
        if width > self.beam_width:
            raise ConfigError(f"setup was for beam_width {self.beam_width}; decode got num_beams {width}")
