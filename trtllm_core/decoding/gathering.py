"""Logits that leave the session: of every prompt token, and those from which tokens were chosen. Nobody pays who does
not ask: a step's buffers are as large as what is asked of it, and what is kept is copied to the host at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trtllm_core.decoding.request import Request


class PromptScores:
    """What a request wants to know of its prompt: logits, or its tokens' log-probabilities. Filled chunk by chunk."""

    def __init__(self, request: Request, vocab_size: int, vocab_size_padded: int) -> None:
        length = len(request.prompt)
        self.logits = torch.zeros(length, vocab_size_padded) if request.context_logits else None
        """float32 ``[tokens, vocab_size_padded]``, before processors, on the CPU; None: not asked for."""
        self.log_probs = [0.0] * length
        """Of each prompt token after those before it. The first is given, and virtual ones are no tokens: 0."""
        self.top_log_probs: list[dict[int, float]] = [{} for _ in range(length)]
        """At each prompt token but the first the likeliest tokens, where asked for."""
        self.complete = self.told = False
        self._others = request.sampling.prompt_logprobs
        self._prompt = torch.tensor(request.prompt)
        self._vocab_size = vocab_size

    @classmethod
    def of(cls, request: Request, vocab_size: int, vocab_size_padded: int) -> PromptScores | None:
        """None: the request wants nothing."""
        if not request.scores_prompt:
            return None
        return cls(request, vocab_size, vocab_size_padded)

    def add(self, position: np.ndarray, logits: torch.Tensor) -> None:
        """The prompt tokens at ``position [n]``, ascending, gave ``logits [n, vocab_size_padded]``."""
        if self.logits is not None:
            self.logits[torch.from_numpy(position)] = logits.cpu()
        if self._others is not None:
            self._score(position, logits[:, : self._vocab_size])
        self.complete |= int(position[-1]) == len(self._prompt) - 1

    def _score(self, position: np.ndarray, logits: torch.Tensor) -> None:
        count = int((position < len(self._prompt) - 1).sum())  # the last token's successor is no prompt token
        if not count:
            return
        after, logits = torch.from_numpy(position[:count] + 1), logits[:count]
        target, total = self._prompt[after], logits.logsumexp(1)
        real = target < self._vocab_size
        picked = logits.gather(1, torch.where(real, target, 0).to(logits.device).unsqueeze(1)).squeeze(1) - total
        for at, value in zip(after.tolist(), torch.where(real, picked.cpu(), 0.0).tolist(), strict=True):
            self.log_probs[at] = value
        if self._others:
            values, ids = logits.topk(min(self._others, self._vocab_size), dim=1)
            rows = zip(after.tolist(), ids.tolist(), (values - total.unsqueeze(1)).tolist(), strict=True)
            for at, tokens, chances in rows:
                self.top_log_probs[at] = dict(zip(tokens, chances, strict=True))


class Gathering:
    """Kept by slot: whose logits are wanted."""

    def __init__(self) -> None:
        self._prompts: dict[int, PromptScores] = {}
        self._choosing: set[int] = set()
        self._rows: dict[int, torch.Tensor] = {}

    def begin(self, slot: int, request: Request, scores: PromptScores | None) -> None:
        """A branch of ``request`` may run in ``slot``; ``scores`` where its prompt runs there."""
        if scores is not None:
            self._prompts[slot] = scores
        if request.generation_logits:
            self._choosing.add(slot)

    def end(self, slot: int) -> None:
        """The slot is free."""
        self._prompts.pop(slot, None)
        self._choosing.discard(slot)

    @property
    def keeps(self) -> bool:
        """Whether the logits are kept that some of the step's tokens were chosen from."""
        return bool(self._rows)

    @property
    def wants_prompts(self) -> bool:
        """Whether the logits of some prompt are wanted yet."""
        return bool(self._prompts)

    def asked(self, owner: np.ndarray, position: np.ndarray) -> np.ndarray | None:
        """Which of a step's tokens give logits that a prompt wants, int64 ``[n]``; None: none.

        Args:
            owner: int64 ``[tokens]``: the slot of each token.
            position: int64 ``[tokens]``.
        """
        if not self._prompts:
            return None
        wanted = np.zeros(len(owner), bool)
        for slot, scores in self._prompts.items():
            wanted |= (owner == slot) & (position < len(scores.log_probs))
        return np.flatnonzero(wanted) if wanted.any() else None

    def keep(self, owner: np.ndarray, position: np.ndarray, logits: torch.Tensor) -> None:
        """The logits of the tokens that were ``asked`` for, ``[n, vocab_size_padded]``."""
        for slot in np.unique(owner).tolist():
            mine, scores = np.flatnonzero(owner == slot), self._prompts[slot]
            scores.add(position[mine], logits[torch.from_numpy(mine).to(logits.device)])
            if scores.complete:
                del self._prompts[slot]

    def note(self, slots: Sequence[int], logits: torch.Tensor) -> None:
        """The raw logits that the next tokens are chosen from: row ``i`` of slot ``slots[i]``, by position."""
        self._rows = {}
        if self._choosing:
            places: dict[int, list[int]] = {}
            for i, slot in enumerate(slots):
                if slot in self._choosing:
                    places.setdefault(slot, []).append(i)
            # Copies: the step's buffer is used again.
            self._rows = {slot: logits[rows].cpu() for slot, rows in places.items()}

    def chosen_from(self, slot: int, count: int) -> list[torch.Tensor]:
        """The logits of ``count`` tokens that were chosen in a slot's row, each ``[vocab_size_padded]``; NaN for those
        that a decoder chose without logits of their own."""
        rows = self._rows.get(slot)
        if rows is None:
            return []
        missing = torch.full_like(rows[0], torch.nan)
        return [rows[i] if i < len(rows) else missing for i in range(count)]
