"""Runs the logits processors and stopping criteria of ``transformers`` as plugins. Does not import it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trtllm_core.errors import ConfigError, PluginContractError
from trtllm_core.plugin import (
    BranchView,
    DecodingContext,
    HostLogitsProcessor,
    HostStoppingCriterion,
    LogitsCapabilities,
    Phase,
    Stop,
    StoppingCapabilities,
)

STATELESS = frozenset(
    {
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
    }
)
"""Classes of ``transformers`` whose answer depends on their arguments alone: one object serves all branches."""


class _Members:
    """The objects of a list, one by one, and whether they keep a state."""

    def __init__(self, given: Any, stateless: bool | None) -> None:
        self.objects = list(given) if isinstance(given, (list, tuple)) else [given]
        for thing in self.objects:
            if not callable(thing):
                raise ConfigError(f"{thing!r} cannot be called: give a processor or criterion of transformers")
            held = [name for name, value in vars(thing).items() if isinstance(value, torch.nn.Module)]
            if held:
                raise ConfigError(
                    f"{type(thing).__name__} runs a model of its own ({held[0]}), beside the engine and its cache: "
                    "use a plugin that asks for companions instead, such as cfg of trtllm-contrib-cfg"
                )
        known = all(type(thing).__name__ in STATELESS and _is_theirs(thing) for thing in self.objects)
        self.stateless = known if stateless is None else stateless

    def start(self) -> list[Any]:
        """The objects for a new branch: these, or copies where they may keep a state."""
        return self.objects if self.stateless else copy.deepcopy(self.objects)

    @property
    def name(self) -> str:
        """What an error or a plan calls them."""
        return ", ".join(type(thing).__name__ for thing in self.objects)


class TransformersLogitsProcessor(HostLogitsProcessor):
    """Runs a ``LogitsProcessor`` or ``LogitsProcessorList`` of transformers, one branch at a time.

    It is called with ``input_ids`` int64 ``[1, length]`` and ``scores`` float32 ``[1, vocab_size]``, on the engine's
    device. What may keep a state is copied for each branch, so requests never share one.

    Args:
        processor: the object, or a list of them.
        phase: where it stands among ours. Raw logits are seen in ``Phase.BIAS``.
        stateless: whether its answer depends on its arguments alone; then it takes part in speculation. None knows
            the classes of transformers, and says no of all others.

    Raises:
        ConfigError: it is no such object, or runs a model of its own.
    """

    def __init__(self, processor: Any, phase: Phase = Phase.BIAS, stateless: bool | None = None) -> None:
        self._members = _Members(processor, stateless)
        self.phase = phase  # type: ignore[misc]
        self.capabilities = LogitsCapabilities(  # type: ignore[misc]
            speculation="per_position" if self._members.stateless else "none"
        )

    def setup(self, context: DecodingContext) -> None:
        self._vocab_size = context.vocab_size

    def start(self, view: BranchView) -> Any:
        """The objects of the branch."""
        return self._members.start()

    def process(self, state: Any, tokens: Sequence[int], logits: torch.Tensor) -> None:
        ids = torch.tensor([list(tokens)], device=logits.device)
        scores = given = logits[None, : self._vocab_size]
        for processor in state:
            scores = processor(ids, scores)
            if not isinstance(scores, torch.Tensor) or scores.shape != given.shape:
                raise PluginContractError(f"{type(processor).__name__} returned no scores of shape {list(given.shape)}")
        if scores is not given:
            given.copy_(scores)

    def copy(self, state: Any) -> Any:
        return state if self._members.stateless else copy.deepcopy(state)

    def take_back(self, state: Any, n: int) -> Any:
        return state if self._members.stateless else super().take_back(state, n)


class TransformersStoppingCriterion(HostStoppingCriterion):
    """Runs a ``StoppingCriteria`` or ``StoppingCriteriaList`` of transformers, one branch at a time.

    It is called with ``input_ids`` int64 ``[1, length]``, the new token included, and ``scores`` None. The branch ends
    with reason ``stopping_criteria``, and the result's ``matched`` names the class.

    Args:
        criterion: the object, or a list of them.
        stateless: as for ``TransformersLogitsProcessor``.
    """

    def __init__(self, criterion: Any, stateless: bool | None = None) -> None:
        self._members = _Members(criterion, stateless)
        for thing in self._members.objects:
            if type(thing).__name__ == "ConfidenceCriteria":
                raise ConfigError("ConfidenceCriteria needs the scores of all steps, which are not kept")
        self.capabilities = StoppingCapabilities(  # type: ignore[misc]
            speculation="per_position" if self._members.stateless else "none"
        )

    def start(self, view: BranchView) -> Any:
        """The objects of the branch."""
        return self._members.start()

    def check(self, state: Any, tokens: Sequence[int], new: Sequence[int]) -> Stop | None:
        ids = torch.tensor([[*tokens, *new]])
        for at in range(len(new)):
            for criterion in state:
                if _true(criterion, ids[:, : len(tokens) + at + 1]):
                    return Stop("stopping_criteria", at, matched=type(criterion).__name__)
        return None

    def copy(self, state: Any) -> Any:
        return state if self._members.stateless else copy.deepcopy(state)

    def take_back(self, state: Any, n: int) -> Any:
        return state if self._members.stateless else super().take_back(state, n)


def _true(criterion: Callable[..., Any], ids: torch.Tensor) -> bool:
    """A criterion's answer for one row: a bool, as it was once, or a tensor of one."""
    answer = criterion(ids, None)
    if isinstance(answer, torch.Tensor) and answer.numel() != 1:
        raise PluginContractError(f"{type(criterion).__name__} returned {list(answer.shape)} answers for one row")
    return bool(answer)


def _is_theirs(thing: object) -> bool:
    """Somebody else's class may have the name of one of transformers, and keep a state."""
    return type(thing).__module__.partition(".")[0] == "transformers"
