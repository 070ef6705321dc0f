"""``LogitsProcessorConformance``: what every logits processor must do, and what one must that declares more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trtllm_core.decoding.host import HostProcessorAdapter
from trtllm_core.plugin import (
    BranchView,
    DeviceLogitsProcessor,
    HostLogitsProcessor,
    LogitsBatch,
    LogitsCapabilities,
    LogitsProcessor,
    Phase,
)
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.testing.generations import generate
from trtllm_core.testing.kit import passed_over, require
from trtllm_core.testing.lives import SLOTS, Branch, Life, Rig, Setting
from trtllm_core.testing.slotkit import SlotConformance
from trtllm_core.testing.subject import LOGITS_PROCESSOR

TOLERANCE = 1e-4
"""How far two logits may lie apart that should be the same: sums over rows depend on the batch by less."""

LEAST = -1e30
"""Tokens with lower logits are forbidden."""


class ProcessorRig(Rig[torch.Tensor]):
    """A logits processor. Its answer about a slot is the processed row, float32 ``[vocab_size_padded]``."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        context = self.floor.context
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(context.slots, context.vocab_size_padded, generator=generator)
        self.rows = rows.mul_(3).to(context.device)
        """The raw logits of each slot, as a model with a padded vocabulary gives them."""
        self.rows[:, context.vocab_size :] = torch.finfo(torch.float32).min
        self.prompts: dict[int, tuple[tuple[int, ...], ...]] = {}
        """The companions of each slot, as the plugin asked for them."""

    def wrapped(self, plugin: Any) -> SlotPlugin:
        """See ``Rig``, as all that follows."""
        if isinstance(plugin, HostLogitsProcessor):
            return HostProcessorAdapter(plugin, self.floor.history)
        require(isinstance(plugin, DeviceLogitsProcessor), f"it is a {type(plugin).__name__}, no logits processor")
        return plugin  # type: ignore[no-any-return]

    def begin(self, slot: int, branch: Branch) -> None:
        case = branch.case
        view = BranchView("", 0, -1, branch.prompt, case.sampling, self.setting.end_ids, branch.seed, case.params)
        self.prompts[slot] = tuple(map(tuple, self.plugin.companions(view)))
        super().begin(slot, branch)

    def positions(self, slots: Sequence[int], **rows: Any) -> LogitsBatch:
        """A step's positions, as ``Floor.positions``, with the logits of the slots' companions."""
        batch = self.floor.positions(slots, **rows)
        of = [self.prompts.get(slot, ()) for slot in slots]
        width = max(map(len, of), default=0)
        if not width:
            return batch
        # Any rows will do that go by the slot alone. They stand in another order than the positions.
        logits: list[torch.Tensor] = []
        index = torch.full((len(slots), width), -1)
        for i in reversed(range(len(slots))):
            for j in range(len(of[i])):
                index[i, j] = len(logits)
                logits.append(self.rows[(slots[i] + 1 + j) % len(self.rows)])
        return replace(batch, companion_logits=torch.stack(logits), companions=index.to(batch.slot.device))

    def answers(self, slots: Sequence[int]) -> dict[int, torch.Tensor]:
        return dict(zip(slots, self.processed(slots), strict=True))

    def processed(self, slots: Sequence[int], logits: torch.Tensor | None = None, **rows: Any) -> torch.Tensor:
        """What ``apply`` makes of a step's logits; None takes each slot's own."""
        given = (self.rows[list(slots)] if logits is None else logits).clone()
        batch = self.positions(slots, **rows)
        result = self.call(self.acting.apply, given, batch)
        require(result is None or isinstance(result, torch.Tensor), f"apply returned a {type(result).__name__}")
        result = given if result is None else result
        for what in ("shape", "dtype", "device"):
            found, due = getattr(result, what), getattr(given, what)
            require(found == due, f"apply returned logits of {what} {found}, not {due}")
        return result

    def possible(self, wanted: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {slot: [] for slot in wanted}
        for at in range(max(map(len, wanted.values()))):
            slots = [slot for slot, tokens in wanted.items() if at < len(tokens)]
            drafts = {slot: found[slot] for slot in slots} if at else None
            for slot, row in zip(slots, self.processed(slots, offsets=[at] * len(slots), drafts=drafts), strict=True):
                found[slot].append(_near(row[: self.setting.vocab_size], wanted[slot][at]))
        return found

    def difference(self, one: torch.Tensor, other: torch.Tensor) -> str:
        return tensor_difference(one, other)


def tensor_difference(one: torch.Tensor, other: torch.Tensor) -> str:
    """How two rows of logits differ; empty where they do not."""
    apart = ~torch.isclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    if not apart.any():
        return ""
    token = int(apart.int().argmax())
    return f"token {token} gets the logit {float(one[token]):.6g}, not {float(other[token]):.6g}"


def _near(row: torch.Tensor, wanted: int) -> int:
    """A token that may be chosen: the one that is wanted, if it may."""
    if row[wanted] > LEAST:
        return wanted
    able = (row > LEAST).nonzero().flatten().tolist()
    return able[wanted % len(able)] if able else wanted


class LogitsProcessorConformance(SlotConformance[ProcessorRig]):
    """Subclass it and set ``plugin``."""

    kind = LOGITS_PROCESSOR
    rig = ProcessorRig

    def on_device(self) -> bool:
        """See ``SlotConformance``."""
        return isinstance(self.subject().make(), DeviceLogitsProcessor)

    def ask_all(self, life: Life[ProcessorRig]) -> None:
        """See ``SlotConformance``: with drafts too, where it takes them."""
        slots = list(life.rig.branches)
        life.rig.answers(slots)
        if self.speculates():
            draft = {slot: [1, 2, 3] for slot in slots}
            life.rig.processed([0, 0, 0, 0], offsets=[0, 1, 2, 3], drafts=draft)

    def question(self, rig: ProcessorRig, slots: Sequence[int]) -> Callable[[], torch.Tensor]:
        """See ``SlotConformance``."""
        raw, batch = rig.rows[list(slots)], rig.positions(slots)
        work = raw.clone()

        def ask() -> torch.Tensor:
            work.copy_(raw)
            result: torch.Tensor | None = rig.acting.apply(work, batch)
            return work if result is None else result

        return ask

    # -- what it declares ----------------------------------------------------------------------------------------

    def test_declarations(self) -> None:
        """Phase, order and capabilities are what the core reads."""
        plugin = self.subject().make()
        require(isinstance(plugin.phase, Phase), f"its phase is {plugin.phase!r}, not a Phase")
        require(isinstance(plugin.capabilities, LogitsCapabilities), "its capabilities are no LogitsCapabilities")
        for name in ("before", "after"):
            value = getattr(plugin, name)
            require(isinstance(value, tuple), f"its {name} is {value!r}; write a tuple of registered names")
        if plugin.capabilities.speculation != "none" and isinstance(plugin, HostLogitsProcessor):
            require(
                type(plugin).take_back is not HostLogitsProcessor.take_back,
                f'it declares speculation="{plugin.capabilities.speculation}", but cannot take tokens back: '
                "write take_back",
            )

    def test_companions(self) -> None:
        """They are prompts of the vocabulary's tokens, the same for the same view, before ``setup`` too."""
        subject = self.subject()
        plugin, another = subject.make(), subject.make()
        if type(plugin).companions is LogitsProcessor.companions:
            passed_over("it asks for no companions")
        if isinstance(plugin, HostLogitsProcessor):
            unseen = type(plugin).process_beside is HostLogitsProcessor.process_beside
            require(not unseen, "it asks for companions and never sees their logits: write process_beside")
        vocab = self.setting().vocab_size
        for case in self.cases():
            for prompt in ((1,), (3, 1, 2)):
                view = BranchView("", 0, -1, prompt, case.sampling, (), 1, case.params)
                prompts = plugin.companions(view)
                for one in prompts:
                    sane = len(one) > 0 and all(0 <= token < vocab for token in one)
                    require(sane, f"for prompt {list(prompt)} it asks for the companion {one!r}")
                again = [list(one) for one in another.companions(view)]
                require(again == [list(one) for one in prompts], "asked again, it wants other companions")

    def test_it_does_something(self) -> None:
        """With the parameters tried, some logit changes; else the other checks see little."""
        for seed in range(self.lives):
            life = self.life(seed)
            for _ in range(8):
                rig = life.rig
                slots = list(rig.branches)
                if not torch.equal(rig.processed(slots), rig.rows[slots]):
                    return
                life.commit()
        passed_over("no logit changed in the texts tried: give `params` or `sampling` with which it acts")

    # -- logits --------------------------------------------------------------------------------------------------

    def test_logits_stay_usable(self) -> None:
        """No NaN, no token of the padding that can be chosen, and at least one token left, in masked rows too.

        A constraint owes masked rows nothing: what it demands may be what another one forbids.
        """
        for seed in range(self.lives):
            life = self.life(seed)
            rig, slots = life.rig, list(life.rig.branches)
            vocab = rig.setting.vocab_size
            masked = rig.rows[slots].clone()
            masked[:, ::2] = -torch.inf
            for logits in (None, masked):
                result = rig.processed(slots, logits)
                require(not result.isnan().any(), "it leaves NaN in the logits")
                if logits is not None and rig.plugin.phase == Phase.CONSTRAINT:
                    result = result[result[:, :vocab].amax(1) > -torch.inf]
                most = result[:, :vocab].amax(1)
                require((most > -torch.inf).all(), "it leaves no token that can be chosen")
                require(
                    (result[:, vocab:].amax(1) < most).all(),
                    "it raises a token of the padding (from vocab_size on) above those of the vocabulary",
                )

    def test_rows_of_others_are_untouched(self) -> None:
        """Rows that are not ``active`` keep their logits, bit for bit."""
        for seed in range(self.lives):
            life = self.life(seed)
            rig = life.rig
            slots = life.random.sample([*rig.branches, *life.BYSTANDERS], SLOTS)
            active = [slot in rig.branches for slot in slots]
            result = rig.processed(slots, active=active)
            due = rig.answers(list(rig.branches))
            alone = rig.processed(life.BYSTANDERS, active=[False] * len(life.BYSTANDERS))
            same = torch.equal(alone, rig.rows[list(life.BYSTANDERS)])
            require(same, "in a step of others alone, it changes rows of requests that did not ask for it")
            for slot, row, mine in zip(slots, result, active, strict=True):
                if mine:
                    self.same_answers(rig, {slot: row}, due, "beside rows that did not ask for it")
                else:
                    raw = rig.rows[slot]
                    require(torch.equal(row, raw), "it changes rows of requests that did not ask for it")

    def test_argmax_is_invariant(self) -> None:
        """What declares ``argmax_invariant`` never changes which logit is largest: a greedy request leaves it out."""
        if not self.subject().make().capabilities.argmax_invariant:
            passed_over("it does not declare argmax_invariant")
        for seed in range(self.lives):
            life = self.life(seed)
            rig = life.rig
            for round_ in range(8):
                slots = list(rig.branches)
                generator = torch.Generator().manual_seed(100 * seed + round_)
                logits = torch.randn(len(slots), rig.rows.shape[1], generator=generator)
                logits = (logits * 0.3**round_).round(decimals=2 * round_).to(rig.floor.device)
                logits[:, rig.setting.vocab_size :] = torch.finfo(torch.float32).min
                result = rig.processed(slots, logits)
                require(
                    torch.equal(result.argmax(1), logits.argmax(1)),
                    "it declares argmax_invariant, but changes which token is the likeliest",
                )
                life.commit()

    def test_greedy_requests_without_it(self) -> None:
        """A greedy request gets the same tokens whether the plan leaves it out or log-probabilities keep it in."""
        if not self.subject().make().capabilities.argmax_invariant:
            passed_over("it does not declare argmax_invariant")
        self.skip_unless_it_can_run()
        greedy = [c.sampling.replace(top_k=1, top_p=0.0, decoder=None, return_dict=True) for c in self.cases()][:4]
        kept = [sampling.replace(output_log_probs=True) for sampling in greedy]
        prompts = [[1 + i, 2] for i in range(len(greedy))]
        without = generate(self.setting(), prompts, greedy)
        within = generate(self.setting(), prompts, kept)
        require(without == within, "it declares argmax_invariant, but a greedy request gets other tokens without it")

    # -- speculation ---------------------------------------------------------------------------------------------

    def test_drafts_are_seen(self) -> None:
        """A position behind drafts is processed as if they had been committed, and nothing has been."""
        self.skip_unless_it_speculates()
        for seed in range(self.lives):
            life = self.life(seed, chunk=3)
            rig, slots = life.rig, list(life.rig.branches)
            drafts = rig.possible({slot: life.tokens(3) for slot in slots})
            rows = life.random.sample([(slot, at) for slot in slots for at in range(4)], 4 * len(slots))
            found = rig.processed([slot for slot, _ in rows], offsets=[at for _, at in rows], drafts=drafts)
            other = rig.replayed()
            for at in range(4):
                due = other.answers(slots)
                for (slot, offset), row in zip(rows, found, strict=True):
                    if offset == at:
                        self.same_answers(other, {slot: row}, due, f"behind {at} drafts, it answers differently")
                if at < 3:
                    other.commit({slot: tokens[at : at + 1] for slot, tokens in drafts.items()})
            self.same(rig, rig.replayed(), "after a verify step that committed nothing, its state is another")

    # -- the host kind -------------------------------------------------------------------------------------------

    def test_masks_prepared_beside_the_forward_pass(self) -> None:
        """A host processor's mask is the same whether it is filled while the engine runs or when it is applied."""
        from trtllm_core.decoding.host import HostRow

        if self.on_device():
            passed_over("it is a device plugin")
        for seed in range(self.lives):
            life = self.life(seed)
            rig, slots = life.rig, list(life.rig.branches)
            due = rig.answers(slots)
            rig.acting.prepare([HostRow(slot) for slot in slots])
            self.same_answers(rig, rig.answers(slots), due, "with masks prepared before, it answers differently")
