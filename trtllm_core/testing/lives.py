"""Random lives of slots: texts grow, fork, go back and end, and a plugin is told of it as the loop tells it."""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch

from trtllm_core.checkpoint import Tokenizer
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.decoding.host import HostAdapter
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.testing.floor import Floor
from trtllm_core.testing.subject import Case, Subject

A = TypeVar("A")
R = TypeVar("R")
G = TypeVar("G", bound="Rig[Any]")

SLOTS = 8
POSITIONS = 64
"""From how many rows of logits tokens are chosen, by their places in the text."""
ALPHABET = 10
"""Most tokens of random texts are below it, so that words, n-grams and loops occur."""


@dataclass(frozen=True)
class Setting:
    """What a rig is made for."""

    subject: Subject
    vocab_size: int
    tokenizer: Tokenizer
    device: str = "cpu"
    slots: int = SLOTS
    max_seq_len: int = 96

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence."""
        return self.tokenizer.eos_ids


@dataclass(frozen=True)
class Branch:
    """What has happened to a slot: enough to do it again."""

    case: Case
    prompt: tuple[int, ...]
    number: int = 0
    """Of the branch within its request, which its random numbers depend on."""
    seed: int = 0
    generated: tuple[int, ...] = ()

    @property
    def text(self) -> tuple[int, ...]:
        """Prompt and generated tokens."""
        return self.prompt + self.generated


class Rig(ABC, Generic[A]):
    """A new plugin object and the slots that it is shown. ``A`` is what it answers about one slot."""

    padding: ClassVar[int] = 4

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        text = _token_bytes(setting.tokenizer)
        self.floor = Floor(setting.slots, setting.vocab_size, self.padding, setting.max_seq_len, setting.device, text)
        self.plugin = setting.subject.make()
        self.acting: Any = self.wrapped(self.plugin)
        self.acting.setup(self.floor.context)
        self.branches: dict[int, Branch] = {}
        """Live slots, and what happened to each."""
        self.watch: Callable[[str], AbstractContextManager[Any]] = nullcontext
        """What surrounds each call of the plugin, from now on; it is given the method's name."""

    @abstractmethod
    def wrapped(self, plugin: Any) -> SlotPlugin:
        """The plugin, or the adapter that the core puts before it."""

    @abstractmethod
    def answers(self, slots: Sequence[int]) -> dict[int, A]:
        """What the plugin says of each slot now, all asked in one batch, in this order. Changes nothing."""

    @abstractmethod
    def difference(self, one: A, other: A) -> str:
        """How two answers differ; empty where they do not."""

    def call(self, method: Callable[..., R], *args: object) -> R:
        """Call the plugin."""
        with self.watch(method.__name__):
            result = method(*args)
        if isinstance(self.acting, HostAdapter):
            for error in self.acting.take_failed().values():
                raise error
        return result

    def possible(self, wanted: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """The tokens that are wanted, or others in their place where the plugin would not let them be chosen."""
        return {slot: list(tokens) for slot, tokens in wanted.items()}

    def stops(self, new: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """How many of the new tokens stay in slots that end with them."""
        ends = {slot: [token in self.setting.end_ids for token in tokens] for slot, tokens in new.items()}
        return {slot: found.index(True) + 1 for slot, found in ends.items() if any(found)}

    def scores(self) -> torch.Tensor | None:
        """What tokens are chosen from, float32 ``[positions, vocab_size_padded]``, for a plugin that needs it."""
        if "logits" not in self.plugin.capabilities.needs:
            return None
        context = self.floor.context
        generator = torch.Generator().manual_seed(2)
        scores = torch.randn(POSITIONS, context.vocab_size_padded, generator=generator).mul_(4)
        scores[:, context.vocab_size :] = torch.finfo(torch.float32).min
        return scores.to(self.floor.device)

    def begin(self, slot: int, branch: Branch) -> None:
        """A branch starts, with its prompt only."""
        case = branch.case
        sampling = case.sampling
        ends = self.setting.end_ids
        view = self.floor.begin(slot, branch.prompt, sampling, case.params, ends, branch.seed, branch.number)
        self.call(self.acting.begin, slot, view)
        self.branches[slot] = replace(branch, generated=())

    def commit(self, new: Mapping[int, Sequence[int]], bystanders: Iterable[int] = ()) -> None:
        """Tokens are accepted, all in one batch; ``bystanders`` are slots of others in the same step."""
        told = {**new, **dict.fromkeys(bystanders, (1,))}
        batch = self.floor.chosen(told, [slot in new for slot in told], self.scores())
        self.floor.commit(batch)
        self.call(self.acting.commit, batch)
        for slot, tokens in new.items():
            branch = self.branches[slot]
            self.branches[slot] = replace(branch, generated=branch.generated + tuple(tokens))

    def fork(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Slots become copies: (source, destination) pairs, all at the same time."""
        src, dst = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.floor.fork(src, dst)
        device = self.floor.device
        self.call(self.acting.fork, torch.tensor(src, device=device), torch.tensor(dst, device=device))
        made = {d: replace(self.branches[d], generated=self.branches[s].generated) for s, d in pairs}
        self.branches.update(made)

    def rewind(self, slot: int, n: int) -> None:
        """The last ``n`` tokens of a slot go back."""
        branch = self.branches[slot]
        self.branches[slot] = replace(branch, generated=branch.generated[: len(branch.generated) - n])
        self.floor.rewind(slot, n)
        self.call(self.acting.rewind, slot, n)

    def end(self, slot: int) -> None:
        """The branch is over."""
        self.acting.end(slot)
        del self.branches[slot]

    def replayed(self) -> Self:
        """A new plugin that was told the same texts from their beginnings, token by token and nothing else."""
        other = type(self)(self.setting)
        for slot, branch in self.branches.items():
            other.begin(slot, branch)
        for at in range(max((len(branch.generated) for branch in self.branches.values()), default=0)):
            other.commit({s: b.generated[at : at + 1] for s, b in self.branches.items() if at < len(b.generated)})
        return other


@dataclass
class Life(Generic[G]):
    """Drives a rig through random events. Slots 0 to 3 are branches of one request, 4 and 5 of another; 6 and 7 are
    used by requests that do not ask for the plugin.

    Args:
        rig: the plugin and its slots.
        cases: requests; which two of them live is drawn.
        chunk: most tokens that one commit brings a slot.
        seed: of the life.
    """

    rig: G
    cases: Sequence[Case]
    chunk: int = 1
    seed: int = 0
    random: random.Random = field(init=False)

    GROUPS: ClassVar = ((0, 1, 2, 3), (4, 5))
    BYSTANDERS: ClassVar = (6, 7)

    def __post_init__(self) -> None:
        self.random = random.Random(f"life {self.seed}")
        for slot in self.BYSTANDERS:
            self.rig.floor.begin(slot, self.tokens(4), self.cases[0].sampling)
        for group in self.GROUPS:
            self.begin(group)

    def tokens(self, count: int) -> list[int]:
        """Random tokens, most of them of a small alphabet."""
        vocab = self.rig.setting.vocab_size
        return [
            self.random.randrange(min(ALPHABET, vocab) if self.random.random() < 0.85 else vocab) for _ in range(count)
        ]

    def begin(self, group: Sequence[int]) -> None:
        """A request starts, with all its branches."""
        case, prompt = self.random.choice(self.cases), tuple(self.tokens(self.random.randint(2, 9)))
        seed = self.random.randrange(1000)
        for number, slot in enumerate(group):
            self.rig.begin(slot, Branch(case, prompt, number, seed))

    def commit(self) -> None:
        """Some slots get tokens. What ends with them begins anew."""
        live = list(self.rig.branches)
        slots = self.random.sample(live, self.random.randint(1, len(live)))
        self.give({slot: self.tokens(self.random.randint(1, self.chunk)) for slot in slots})

    def give(self, new: Mapping[int, Sequence[int]]) -> None:
        """Slots get these tokens, as far as the plugin lets them. What ends begins anew."""
        new = self.rig.possible(new)
        stops = self.rig.stops(new)
        kept = {slot: tokens[: stops.get(slot, len(tokens))] for slot, tokens in new.items()}
        self.rig.commit(kept, [slot for slot in self.BYSTANDERS if self.random.random() < 0.5])
        for slot in stops:
            branch = self.rig.branches[slot]
            self.rig.end(slot)
            self.rig.begin(slot, branch)

    def cycle(self, size: int) -> None:
        """``size`` branches of the larger request go round."""
        ring = self.random.sample(self.GROUPS[0], size)
        self.rig.fork(list(zip(ring, ring[1:] + ring[:1], strict=True)))

    def fork(self) -> None:
        """Some branches of both requests become copies of their siblings."""
        pairs = [
            (self.random.choice(group), slot)
            for group in self.GROUPS
            for slot in self.random.sample(group, self.random.randint(1, len(group)))
        ]
        self.rig.fork(pairs)

    def rewind(self) -> None:
        """A slot gives some of its last tokens back."""
        able = [slot for slot, branch in self.rig.branches.items() if branch.generated]
        if able:
            slot = self.random.choice(able)
            most = min(4, len(self.rig.branches[slot].generated))
            self.rig.rewind(slot, self.random.randint(1, most))

    def restart(self) -> None:
        """A request ends, and another one takes its slots, in another order."""
        group = self.random.choice(self.GROUPS)
        for slot in group:
            self.rig.end(slot)
        self.begin(self.random.sample(group, len(group)))

    def grow(self, rounds: int) -> None:
        """Several commits."""
        for _ in range(rounds):
            self.commit()


@functools.lru_cache(maxsize=8)
def _token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    return TokenBytes.of(tokenizer)
