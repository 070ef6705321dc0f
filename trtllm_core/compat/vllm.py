"""Runs logits processors written for vLLM as plugins. Does not import it.

There are two kinds: callables of one request, and the batch processors of vLLM's V1 engine, with ``update_state``,
``apply`` and ``is_argmax_invariant``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from trtllm_core.errors import ConfigError, PluginContractError
from trtllm_core.plugin import (
    BranchView,
    CommitBatch,
    DecodingContext,
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    LogitsBatch,
    LogitsCapabilities,
    Phase,
)

INTERFACE = "vllm.v1.sample.logits_processor"


class MoveDirectionality(Enum):
    """How a request moves. We only move one to a place that is free."""

    UNIDIRECTIONAL = 0
    SWAP = 1


@dataclass(frozen=True)
class BatchUpdate:
    """What changed since the last step: first what left, then what came, then what moved, as vLLM orders it."""

    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple[int, Any, list[int], list[int]]]
    """(place, sampling params, prompt, generated tokens: a list that grows)."""
    moved: Sequence[tuple[int, int, Any]]


class BatchProcessor(Protocol):
    """What an instance for ``VLLMBatchProcessor`` has."""

    def update_state(self, batch_update: Any) -> None:
        """Requests came, left or moved; None: only tokens were added."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change float32 ``[batch, vocab_size]``, in place or not, and return it."""

    def is_argmax_invariant(self) -> bool:
        """Whether it never changes which logit is largest."""


class VLLMRequestProcessor(HostLogitsProcessor):
    """Runs a callable ``(prompt_tokens, generated_tokens, logits) → logits``, or one without the prompt.

    ``logits`` is float32 ``[vocab_size]``. A callable with a method ``clone`` is cloned for each branch.

    Args:
        function: the callable.
        phase: where it stands among ours; raw logits are seen in ``Phase.BIAS``.
    """

    capabilities = LogitsCapabilities()

    def __init__(self, function: Callable[..., torch.Tensor], phase: Phase = Phase.BIAS) -> None:
        count = len(inspect.signature(function).parameters)
        if count not in (2, 3):
            raise ConfigError(f"{function!r} takes {count} arguments: a processor of vLLM takes 2 or 3")
        self.function = function
        self.phase = phase  # type: ignore[misc]
        self._with_prompt = count == 3

    def setup(self, context: DecodingContext) -> None:
        self._vocab_size = context.vocab_size

    def start(self, view: BranchView) -> Any:
        """Length of the prompt, and the callable for the branch."""
        return len(view.prompt), _clone(self.function)

    def process(self, state: Any, tokens: Sequence[int], logits: torch.Tensor) -> None:
        size, function = state
        tokens, given = list(tokens), logits[: self._vocab_size]
        before = (tokens[:size],) if self._with_prompt else ()
        result = function(*before, tokens[size:], given)
        _put(result, given, function)

    def copy(self, state: Any) -> Any:
        size, function = state
        return size, _clone(function)


@dataclass(eq=False)
class _Member:
    """One branch in the processor's batch."""

    slot: int
    params: Any
    prompt: list[int]
    generated: list[int] = field(default_factory=list)


class VLLMBatchProcessor(DeviceLogitsProcessor):
    """Runs an instance of vLLM's ``LogitsProcessor`` over the branches that use it.

    It is of the device kind because it needs the whole batch at once; but vLLM has tokens in lists, so the host waits
    for the device in each step.

    A request's sampling params are a namespace with the fields of its ``SamplingConfig`` and ``extra_args``. Branches
    that fork are members of their own, which start with the tokens that they have.

    Args:
        processor: the instance, made as vLLM would: ``MyProcessor(vllm_config, device, is_pin_memory)``.
        extra_args: ``SamplingParams.extra_args``, of all requests or by ``BranchView``.
        params: sampling params of all requests, instead of the namespace.
    """

    def __init__(
        self,
        processor: BatchProcessor,
        extra_args: Mapping[str, Any] | Callable[[BranchView], Mapping[str, Any]] | None = None,
        params: Any = None,
    ) -> None:
        if isinstance(processor, type):
            raise ConfigError(
                f"give an instance of {processor.__name__}, such as {processor.__name__}(None, device, False)"
            )
        invariant = bool(processor.is_argmax_invariant())
        self.processor = processor
        self.capabilities = LogitsCapabilities(argmax_invariant=invariant)  # type: ignore[misc]
        # vLLM runs those after the temperature, and all others on raw logits.
        self.phase = Phase.TRUNCATION if invariant else Phase.BIAS  # type: ignore[misc]
        self._extra_args = extra_args
        self._params = params
        self._members: dict[int, _Member] = {}
        self._places: list[_Member] = []  # the batch as the processor knows it

    def setup(self, context: DecodingContext) -> None:
        self._vocab_size = context.vocab_size

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts.

        Raises:
            ConfigError: the processor refuses its params.
        """
        params = self._params_of(view) if self._params is None else self._params
        try:
            getattr(self.processor, "validate_params", lambda params: None)(params)
        except ValueError as error:
            raise ConfigError(f"{type(self.processor).__name__} refuses the request: {error}") from error
        self._members[slot] = _Member(slot, params, list(view.prompt))

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        self.processor.update_state(self._update())
        place = {member.slot: i for i, member in enumerate(self._places)}
        active = batch.active.nonzero().squeeze(1)
        places = [place[slot] for slot in batch.slot[active].tolist()]
        # Branches that choose no token in this step have their place all the same: what they get is thrown away.
        given = logits.new_zeros(len(self._places), self._vocab_size)
        given[places] = logits[active, : self._vocab_size]
        result = self.processor.apply(given)
        _put(result, given, self.processor)
        logits[active, : self._vocab_size] = given[places]

    def commit(self, batch: CommitBatch) -> None:
        rows = zip(
            batch.active.tolist(), batch.slot.tolist(), batch.counts.tolist(), batch.tokens.tolist(), strict=True
        )
        for active, slot, count, tokens in rows:
            if active:
                self._members[slot].generated += tokens[:count]

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        pairs = zip(src.tolist(), dst.tolist(), strict=True)
        self._members |= {b: self._again(self._members[a].generated, self._members[b]) for a, b in pairs}

    def rewind(self, slot: int, n: int) -> None:
        member = self._members[slot]
        self._members[slot] = self._again(member.generated[: len(member.generated) - n], member)

    def end(self, slot: int) -> None:
        self._members.pop(slot, None)

    def _update(self) -> Any:
        """Let the batch be that of the live branches, and say what changed; None where nothing did."""
        live, known = set(self._members.values()), set(self._places)
        removed = [i for i, member in enumerate(self._places) if member not in live]
        new = [member for member in self._members.values() if member not in known]
        if not removed and not new:
            return None
        places: dict[int, _Member] = {i: member for i, member in enumerate(self._places) if member in live}
        free = iter([*removed, *range(len(self._places), len(self._places) + len(new))])
        added = [(next(free), member) for member in new]
        places.update(added)
        moved = []
        for hole in [i for i in removed if i not in places]:
            last = max(places, default=-1)
            if last > hole:
                places[hole] = places.pop(last)
                moved.append((last, hole, _interface("MoveDirectionality", MoveDirectionality).UNIDIRECTIONAL))
        self._places = [places[i] for i in range(len(places))]
        rows = [(i, member.params, member.prompt, member.generated) for i, member in added]
        return _interface("BatchUpdate", BatchUpdate)(batch_size=len(places), removed=removed, added=rows, moved=moved)

    def _params_of(self, view: BranchView) -> SimpleNamespace:
        extra = self._extra_args(view) if callable(self._extra_args) else self._extra_args
        return SimpleNamespace(**view.sampling.model_dump(), extra_args=dict(extra or {}))

    @staticmethod
    def _again(generated: Sequence[int], member: _Member) -> _Member:
        """The member as one that comes anew, with these tokens: vLLM brings back a preempted request so."""
        return _Member(member.slot, member.params, member.prompt, list(generated))


def _interface(name: str, ours: Any) -> Any:
    """vLLM's own class, where the processor that we run has imported it: it may compare identities."""
    return getattr(sys.modules.get(INTERFACE), name, ours)


def _clone(function: Any) -> Any:
    return function.clone() if hasattr(function, "clone") else function


def _put(result: Any, given: torch.Tensor, who: object) -> None:
    """A processor may change what it is given, return something new, or both."""
    if not isinstance(result, torch.Tensor) or result.shape != given.shape:
        name = getattr(who, "__name__", type(who).__name__)
        raise PluginContractError(f"{name} returned no logits of shape {list(given.shape)}")
    if result is not given:
        given.copy_(result)
