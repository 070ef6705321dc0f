"""Companions in a plan: the prompts that processors ask to have run beside a request, and what stands against them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_core.config import BuildConfig, EngineConfig, SamplingConfig
from trtllm_core.decoding.branching import overrides
from trtllm_core.errors import CapacityError, ConfigError, PluginContractError, PluginError, PluginRuntimeError
from trtllm_core.plugin import BranchView, LogitsProcessor

if TYPE_CHECKING:
    from trtllm_core.decoding.plan import PlanItem
    from trtllm_core.decoding.request import Request


@dataclass(frozen=True, slots=True)
class CompanionPrompts:
    """What one processor has run beside each branch of a request."""

    name: str
    """Of the processor."""
    key: object
    """As in ``PlanItem``."""
    prompts: tuple[tuple[int, ...], ...]


def companions_of(
    processors: Iterable[PlanItem], sampling: SamplingConfig, prompt: Sequence[int]
) -> tuple[CompanionPrompts, ...]:
    """What the processors of a request ask for, each that asks for something.

    Raises:
        ConfigError: a processor refuses what the request asks of it.
        PluginError: it raised anything else, or returned no prompts.
    """
    found = []
    for item in processors:
        plugin = item.plugin
        if isinstance(plugin, LogitsProcessor) and overrides(plugin, LogitsProcessor, "companions"):
            view = BranchView("", 0, -1, prompt, sampling, sampling.end_id or (), sampling.random_seed or 0)
            prompts = _asked_for(item, plugin, view)
            if prompts:
                found.append(CompanionPrompts(item.name, item.key, prompts))
    return tuple(found)


def _asked_for(item: PlanItem, plugin: LogitsProcessor, view: BranchView) -> tuple[tuple[int, ...], ...]:
    try:
        answer = plugin.companions(item.view(view))
    except (PluginError, ConfigError):
        raise
    except Exception as error:
        raise PluginRuntimeError(f"plugin {item.name!r} raised {type(error).__name__}: {error}") from error
    try:
        return tuple(tuple(map(int, prompt)) for prompt in answer)
    except (TypeError, ValueError):
        raise PluginContractError(
            f"plugin {item.name!r} returned {answer!r} from companions, not a sequence of prompts"
        ) from None


def check_slots(branches: int, asked: Sequence[CompanionPrompts], build: BuildConfig | None) -> None:
    """Refuse more branches, companions included, than the engine has slots (None: not known).

    Raises:
        CapacityError: it has fewer.
    """
    beside = sum(len(one.prompts) for one in asked)
    if build is not None and branches * (1 + beside) > build.max_branches:
        names = ", ".join(repr(one.name) for one in asked)
        raise CapacityError(
            f"the request needs {branches * (1 + beside)} slots, {beside} beside each of {branches} for the companions "
            f"of {names}, but the engine has {build.max_branches} (max_batch_size {build.max_batch_size} times "
            f"max_beam_width {build.max_beam_width})"
        )


def check_prompts(asked: Iterable[CompanionPrompts], request: Request, config: EngineConfig) -> None:
    """Refuse companions that the engine cannot run.

    Raises:
        PluginContractError: a prompt is empty, or has token ids that the request may not use.
        CapacityError: one is longer than the engine was built for, alone or with what is generated.
    """
    build, vocab = config.build, config.model.vocab_size
    for one in asked:
        for prompt in one.prompts:
            if not prompt:
                raise PluginContractError(f"plugin {one.name!r} asked for a companion without a single token")
            if request.virtual is not None:
                request.virtual.check(prompt, f"a companion of {one.name!r}")
            elif wrong := [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab]:
                raise PluginContractError(
                    f"plugin {one.name!r} asked for a companion with token id {wrong[0]}, outside the vocabulary of "
                    f"{vocab}"
                )
            new = request.sampling.max_new_tokens
            if len(prompt) > build.max_input_len or len(prompt) + new > build.max_seq_len:
                raise CapacityError(
                    f"a companion of {one.name!r} has {len(prompt)} tokens and gets up to {new} new ones; the engine "
                    f"takes prompts of {build.max_input_len}, and {build.max_seq_len} together"
                )
