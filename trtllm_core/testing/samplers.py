"""``DecoderConformance``: what samplers and decoders must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.planner import offers
from trtllm_core.plugin import Decoder, Sampler
from trtllm_core.plugin.decoder import DecoderCapabilities
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.testing.generations import new_runner
from trtllm_core.testing.kit import passed_over, require
from trtllm_core.testing.lives import SLOTS, Life, Rig, Setting
from trtllm_core.testing.searches import SearchChecks
from trtllm_core.testing.subject import DECODER, Case


class SamplerRig(Rig[tuple[int, ...]]):
    """A sampler. Its answer about a slot is the token that it takes from each of some rows of logits."""

    probes: ClassVar[int] = 5
    """How many rows of logits it is asked about, to learn its state."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        context = self.floor.context
        generator = torch.Generator().manual_seed(1)
        shape = (self.probes, context.slots, context.vocab_size_padded)
        self.rows = torch.randn(shape, generator=generator).mul_(2).to(context.device)
        """Processed logits of each slot: some tokens are forbidden, and so is the padding."""
        self.rows.masked_fill_(torch.rand(shape, generator=generator).to(context.device) < 0.2, -torch.inf)
        self.rows[..., 3] = 0.0
        self.rows[:, :, context.vocab_size :] = torch.finfo(torch.float32).min

    def wrapped(self, plugin: Any) -> SlotPlugin:
        """See ``Rig``, as all that follows."""
        require(isinstance(plugin, Sampler), f"it is a {type(plugin).__name__}, no sampler")
        return plugin  # type: ignore[no-any-return]

    def answers(self, slots: Sequence[int]) -> dict[int, tuple[int, ...]]:
        taken = [self.taken(slots, rows[list(slots)]) for rows in self.rows]
        return dict(zip(slots, zip(*taken, strict=True), strict=True))

    def taken(self, slots: Sequence[int], logits: torch.Tensor, **rows: Any) -> list[int]:
        """The tokens that are sampled from ``logits``, which stay as they are."""
        tokens = self.call(self.acting.sample, logits.clone(), self.floor.positions(slots, **rows))
        good = isinstance(tokens, torch.Tensor) and tokens.shape == (len(slots),)
        require(good, f"sample returned {tokens!r}, not one token for each of {len(slots)} rows")
        integer = tokens.dtype in (torch.int64, torch.int32)
        require(integer and tokens.device == logits.device, f"sample returned {tokens.dtype} on {tokens.device}")
        return tokens.tolist()  # type: ignore[no-any-return]

    def difference(self, one: tuple[int, ...], other: tuple[int, ...]) -> str:
        return "" if one == other else f"it takes the tokens {one}, not {other}"


class DecoderConformance(SearchChecks[SamplerRig]):
    """Subclass it and set ``plugin``: a sampler, or a decoder that owns branches."""

    kind = DECODER
    rig = SamplerRig
    offers = offers(text=True, hidden_states=True) | {"logits"}

    def life(self, seed: int, chunk: int = 1, device: str = "cpu") -> Life[SamplerRig]:
        """See ``SlotConformance``."""
        if self.searches():
            passed_over("it is no sampler: its branches are compared in whole requests")
        return super().life(seed, chunk, device)

    @classmethod
    def begins(cls, case: Case) -> None:
        """See ``SlotConformance``: a decoder needs a session."""
        if isinstance(cls.subject().make(), Decoder):
            new_runner(cls.setting()).generate([[1, 2]], case.sampling.replace(max_new_tokens=1))
        else:
            super().begins(case)

    def test_declarations(self) -> None:
        """Capabilities are what the core reads."""
        plugin = self.subject().make()
        require(isinstance(plugin.capabilities, DecoderCapabilities), "its capabilities are no DecoderCapabilities")

    def seeded(self, case: Case, seed: int) -> SamplingConfig:
        """See ``SlotConformance``: what does not honour ``random_seed`` must not need it."""
        honoured = "random_seed" in self.subject().entry.consumes
        return case.sampling.replace(random_seed=seed) if honoured else case.sampling

    def question(self, rig: SamplerRig, slots: Sequence[int]) -> Callable[[], torch.Tensor]:
        """See ``SlotConformance``."""
        raw, batch = rig.rows[0, list(slots)], rig.floor.positions(slots)
        work = raw.clone()

        def ask() -> torch.Tensor:
            work.copy_(raw)
            tokens: torch.Tensor = rig.acting.sample(work, batch)
            return tokens

        return ask

    def alike_on_gpu(self, here: SamplerRig, there: SamplerRig) -> None:
        """See ``SlotConformance``. A draw at the border of two tokens may fall on either: one in fifty, at most."""
        slots = list(here.branches)
        pairs = zip(here.answers(slots).values(), there.answers(slots).values(), strict=True)
        same = [a == b for one, other in pairs for a, b in zip(one, other, strict=True)]
        require(
            sum(same) >= 0.98 * len(same) - 1,
            f"on a GPU it takes other tokens {same.count(False)} times of {len(same)}",
        )

    def ask_all(self, life: Life[SamplerRig]) -> None:
        """See ``SlotConformance``: with drafts too."""
        slots = list(life.rig.branches)
        life.rig.answers(slots)
        if not self.per_position():
            return
        draft = {slot: [1, 2, 3] for slot in slots}
        life.rig.taken([0, 0, 0, 0], life.rig.rows[0, [0, 0, 0, 0]], offsets=[0, 1, 2, 3], drafts=draft)

    def per_position(self) -> bool:
        """Whether it says that it can be asked behind drafts."""
        declared: bool = self.subject().make().capabilities.per_position
        return declared

    def test_tokens_can_be_chosen(self) -> None:
        """Each token is of the vocabulary and was not forbidden."""
        for seed in range(self.lives):
            life = self.life(seed)
            rig = life.rig
            for _ in range(6):
                slots = list(rig.branches)
                for rows in rig.rows:
                    for slot, token in zip(slots, rig.taken(slots, rows[slots]), strict=True):
                        require(0 <= token < rig.setting.vocab_size, f"it takes token {token}, outside the vocabulary")
                        require(float(rows[slot, token]) > -torch.inf, f"it takes token {token}, which is forbidden")
                life.commit()

    def test_greedy_takes_the_largest(self) -> None:
        """What declares ``greedy`` takes the largest logit, and of equals the first."""
        if not self.subject().make().capabilities.greedy:
            passed_over("it does not declare greedy")
        life = self.life(0)
        slots = list(life.rig.branches)
        for rows in (*life.rig.rows, life.rig.rows[0].round()):
            due = rows[slots].argmax(1).tolist()
            found = life.rig.taken(slots, rows[slots])
            require(
                found == due, f"it declares greedy, but takes the tokens {found}, where {due} have the largest logits"
            )

    def test_beside_rows_of_other_decoders(self) -> None:
        """Rows of requests that chose another decoder come along, and change nothing."""
        for seed in range(self.lives):
            life = self.life(seed)
            rig = life.rig
            slots = life.random.sample([*rig.branches, *life.BYSTANDERS], SLOTS)
            tokens = rig.taken(slots, rig.rows[0, slots], active=[slot in rig.branches for slot in slots])
            due = rig.answers(list(rig.branches))
            for slot, token in zip(slots, tokens, strict=True):
                if slot in due:
                    what = f"beside rows of other decoders, it takes token {token}, not {due[slot][0]}"
                    require(token == due[slot][0], what)

    def test_draws_belong_to_positions(self) -> None:
        """What declares ``per_position`` draws behind drafts as if they had been committed: the position counts."""
        if not self.per_position():
            passed_over("it does not declare per_position: it is not asked about several positions at once")
        for seed in range(self.lives):
            life = self.life(seed)
            rig, slots = life.rig, list(life.rig.branches)
            drafts = {slot: life.tokens(3) for slot in slots}
            found = [rig.taken(slots, rig.rows[0, slots], offsets=[at] * len(slots), drafts=drafts) for at in range(4)]
            other = rig.replayed()
            for at, tokens in enumerate(found):
                due = other.taken(slots, other.rows[0, slots])
                require(tokens == due, f"behind {at} drafts it takes the tokens {tokens}, not {due}")
                if at < 3:
                    other.commit({slot: draft[at : at + 1] for slot, draft in drafts.items()})

    def test_draws_belong_to_requests(self) -> None:
        """A branch draws the same numbers in any slot."""
        for seed in range(self.lives):
            life = self.life(seed)
            other = self.rig(self.setting())
            slots = list(life.rig.branches)
            moved = dict(zip(slots, life.random.sample(slots, len(slots)), strict=True))
            for slot, place in moved.items():
                other.begin(place, life.rig.branches[slot])
                for token in life.rig.branches[slot].generated:
                    other.commit({place: (token,)})
            for rows in life.rig.rows:
                due = life.rig.taken(slots, rows[slots])
                found = other.taken([moved[slot] for slot in slots], rows[slots])
                require(found == due, f"in other slots, the same branches get the tokens {found}, not {due}")
