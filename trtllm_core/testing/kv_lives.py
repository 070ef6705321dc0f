"""Random lives of a KV cache: requests come, write, fork, take back and go, on paper."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.plugin.kv_policy import KVBudget, KVPolicy
from trtllm_core.testing.kit import require
from trtllm_core.testing.papercache import EVERYTHING, PaperCache

VERBS = ("admit", "generate", "rewind", "fork", "release")


class CacheLife:
    """What happens to a policy whose slots live at random. The same seed is the same life.

    ``gentle`` lives neither fork nor take back, and write what their request may have and no more: what ``admit`` says
    must hold then.
    """

    def __init__(
        self, policy: KVPolicy, budget: KVBudget, seed: int, looks: Collection[str] = EVERYTHING, gentle: bool = False
    ) -> None:
        self.cache = PaperCache(policy, budget, looks)
        self.policy, self.texts, self.plan = policy, self.cache.texts, self.cache.plan
        self.random = random.Random(seed)
        self.gentle = gentle
        self.hits = 0
        """Tokens that were found in the cache."""
        self._todo: dict[int, list[int]] = {}
        self._count = 1000

    def live(self, steps: int) -> None:
        """So many random verbs."""
        for _ in range(steps):
            verbs = [verb for verb in VERBS if not self.gentle or verb in ("admit", "generate")]
            getattr(self, self.random.choice(verbs))()

    def end(self) -> None:
        """Everybody goes."""
        self._todo.clear()
        if self.texts:
            self.cache.release(sorted(self.texts), keep=True)

    def some(self) -> list[int]:
        """Some live slots, in any order."""
        slots = sorted(self.texts)
        return self.random.sample(slots, self.random.randint(1, len(slots))) if slots else []

    def length(self, slot: int) -> int:
        """Tokens of a slot."""
        return len(self.texts[slot].tokens)

    def fresh(self, n: int) -> list[int]:
        """Tokens that stand nowhere else."""
        self._count += n
        return list(range(self._count - n, self._count))

    def prompt(self, most: int) -> list[int]:
        """A prompt, which often begins like others."""
        length = self.random.randint(1, most)
        texts = [text.tokens for text in self.texts.values()]
        like = self.random.choice([[], [1] * most, [1] * (most // 2) + [2] * most, *texts])[:length]
        return [*like, *self.fresh(length - len(like))]

    # -- verbs ---------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """A request comes, and its prompt is computed."""
        budget = self.cache.budget
        free = [slot for slot in range(budget.max_slots) if slot not in self.texts]
        if not free:
            return
        slot, prompt = self.random.choice(free), self.prompt(max(budget.max_seq_len // 2, 1))
        new = self.random.randint(0, budget.max_seq_len - len(prompt))
        before = self.cache.state()
        try:
            hit = self.cache.admit(slot, prompt, new, (self.random.choice(["", "", "x"]),))
        except CapacityError:  # it may be larger than the pool
            self._unchanged(before)
            return
        if hit is None:
            require(self.texts, "admit makes a request wait although nothing runs")
            self._unchanged(before)
            return
        self.hits += hit
        if self.gentle:
            self._todo[slot] = [*prompt[hit:], *self.fresh(new)]
        else:
            self.write([slot], [prompt[hit:]], [len(prompt) - hit])

    def generate(self) -> None:
        """Some slots write. Of what they wrote, they may keep less."""
        if self.gentle:
            self._go_on()
            return
        slots, longest = self.some(), self.cache.budget.max_seq_len
        counts = [min(self.random.randint(0, 6), longest - self.length(slot)) for slot in slots]
        # In a ring whatever is written destroys something: write only what is committed.
        final = self.plan.window is not None or self.plan.evicts
        kept = [n if final else self.random.randint(0, n) for n in counts]
        self.write(slots, [self.fresh(n) for n in counts], kept)

    def _go_on(self) -> None:
        slots = self.some()
        new = [self._todo[slot][: self.random.randint(0, 6)] for slot in slots]
        try:
            self.cache.write(slots, new)
        except CapacityError as error:
            raise AssertionError(
                f"slots that keep within what they were admitted for run out of room: {error}"
            ) from error
        for slot, tokens in zip(slots, new, strict=True):
            del self._todo[slot][: len(tokens)]
            if not self._todo[slot]:
                self.cache.release([slot], keep=True)

    def write(self, slots: list[int], tokens: list[list[int]], kept: list[int]) -> None:
        """Write; nothing must have happened where there was no room."""
        self.tried(CapacityError, lambda: self.cache.write(slots, tokens, kept))

    def rewind(self) -> None:
        """Some slots take tokens back. A ring may refuse."""
        slots = self.some()
        counts = [self.random.randint(0, min(self.length(slot), 8)) for slot in slots]
        if self.plan.evicts:
            return  # what it has moved, it cannot take back
        if self.plan.window is None:
            self.cache.rewind(slots, counts)
        else:
            self.tried(ConfigError, lambda: self.cache.rewind(slots, counts))

    def fork(self) -> None:
        """Some slots, live or not, become copies of live ones; often live slots change places."""
        if not self.texts:
            return
        slots = sorted(self.texts)
        if self.random.random() < 0.5:
            target = self.some()
            source = self.random.sample(target, len(target))
        else:
            every = range(self.cache.budget.max_slots)
            target = self.random.sample(every, self.random.randint(1, len(every)))
            source = [self.random.choice(slots) for _ in target]
        self.tried(CapacityError, lambda: self.cache.fork(source, target))

    def release(self) -> None:
        """Some slots end."""
        if slots := self.some():
            self.cache.release(slots, keep=self.random.random() < 0.7)

    # -- failing -------------------------------------------------------------------------------------------------

    def tried(self, error: type[Exception], verb: Callable[[], None]) -> bool:
        """Whether a verb went well; where it did not, nothing has changed."""
        before = self.cache.state()
        try:
            verb()
        except error:
            self._unchanged(before)
            return False
        return True

    def _unchanged(self, before: Any) -> None:
        require(self.cache.state() == before, "a call that failed, or said no, changed something")
