"""Requests that run, and their branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from trtllm_core.decoding.detokenizer import TextStream
from trtllm_core.decoding.gathering import PromptScores
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Request
from trtllm_core.plugin import Hypothesis, Stop


@dataclass(slots=True, eq=False)
class Branch:
    """One live sequence of a request, in a slot."""

    owner: LiveRequest
    slot: int
    number: int
    generated: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    likeliest: list[Mapping[int, float]] = field(default_factory=list)
    """Beside each token, where asked for: likely tokens and their log-probabilities."""
    logits: list[torch.Tensor] = field(default_factory=list)
    """What each token was chosen from, where the request keeps it: float32 ``[vocab_size_padded]``, on the CPU."""
    score: float | None = None
    """What a search gives it; None where no search runs."""
    rank: float = 0.0
    """What it would be ranked by if it ended now."""
    text: str = ""
    """Text so far: whole characters, and nothing that a stop string may yet cut."""
    stream: TextStream | None = None

    @property
    def request(self) -> Request:
        """Whose it is."""
        return self.owner.request

    def copy_to(self, slot: int, number: int) -> Branch:
        """The same history in another slot."""
        stream = None if self.stream is None else self.stream.fork()
        lists = self.generated.copy(), self.log_probs.copy(), self.likeliest.copy(), self.logits.copy()
        return Branch(self.owner, slot, number, *lists, self.score, self.rank, self.text, stream)

    def say(self, tokens: Sequence[int], held: int) -> str:
        """Tokens were added: the text that is certain now, ``held`` bytes of it kept back."""
        if self.stream is None:
            return ""
        text = self.stream.push(tokens, held)
        self.text += text
        return text

    def say_last(self, tokens: Sequence[int], stop: Stop | None) -> str:
        """The last tokens were added, or none: the rest of the text, up to where ``stop`` cuts it."""
        if self.stream is None:
            return ""
        shown = tokens[:-1] if stop is not None and not stop.counted else tokens
        text = self.stream.finish(shown, 0 if stop is None else stop.trim_text)
        self.text += text
        return text

    def hypothesis(self, reason: str, stop: Stop | None = None) -> Hypothesis:
        """What the branch is, as a finished sequence."""
        total = sum(self.log_probs) if self.score is None else self.score
        tokens, log_probs = tuple(self.generated), tuple(self.log_probs)
        beside = tuple(self.likeliest)
        return Hypothesis(
            tokens, self.rank, reason, self.number, total, log_probs, self.text, stop, beside, tuple(self.logits)
        )


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request from its admission to its end, and afterwards what it left."""

    request: Request
    plan: Plan
    slots: tuple[int, ...]
    """By branch number: all that were set aside, resting ones included."""
    most: int = 0
    """Tokens that a sequence can have, prompt included."""
    scores: PromptScores | None = None
    """Logits and log-probabilities of its prompt, where it wants them."""
    cached_prompt: int = 0
    """Tokens of its prompt that were in the cache when it started."""
    companions: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """The prompts of the companions of all branches, by slot."""
    running: list[Branch] = field(default_factory=list)
    """The branches that the next step runs."""
    put_off: bool = False
    """Its cache was given up: it keeps its slots and waits for room."""
    preemptions: int = 0
    """How often that happened."""
    unborn: list[Branch] = field(default_factory=list)
    """Branches that begin when the prompt is through."""
    hypotheses: list[Hypothesis] = field(default_factory=list)
    """Sequences that are finished, in the order in which they were."""
    sequences: tuple[Hypothesis, ...] | None = None
    """What the user gets, best first; None while the request runs."""
    shown: dict[int, tuple[Branch, int, int]] = field(default_factory=dict)
    """By sequence, where branches are ranked: the branch that deltas have told under its number, and how much of its
    tokens and text."""
    error: Exception | None = None
    drafted: int = 0
    """Drafts that ran."""
    accepted: int = 0
    """Drafts that became text."""
    plugin_seconds: dict[str, float] = field(default_factory=dict)
    """Its part of each plugin's host time: filled when its branches leave their slots."""

    def standing(self) -> dict[int, Hypothesis]:
        """The sequences that the user gets, as far as they are known: by number."""
        if self.sequences is not None:
            return dict(enumerate(self.sequences))
        if self.plan.ranked:
            return {number: branch.hypothesis("") for number, (branch, _, _) in self.shown.items()}
        ended = {one.branch: one for one in self.hypotheses}
        return ended | {branch.number: branch.hypothesis("") for branch in (*self.running, *self.unborn)}

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.sequences is not None

    @property
    def finish_reason(self) -> str | None:
        """Why its best sequence ended; None while it runs."""
        return None if self.sequences is None else self.sequences[0].reason

    @property
    def ended_well(self) -> bool:
        """Whether neither a failure nor the user ended it, as far as it has come."""
        return self.error is None and self.finish_reason != "cancelled"

    @property
    def generated(self) -> int:
        """Tokens of what the user gets."""
        return sum(len(one.tokens) for one in self.sequences or ())
