"""``StoppingCriterionConformance``: what every stopping criterion must do, and what one must that declares more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trtllm_core.decoding.host import HostCriterionAdapter
from trtllm_core.plugin import DeviceStoppingCriterion, HostStoppingCriterion, Stop, StoppingCapabilities
from trtllm_core.plugin.lifecycle import SlotPlugin
from trtllm_core.testing.kit import passed_over, require
from trtllm_core.testing.lives import ALPHABET, Rig
from trtllm_core.testing.slotkit import SlotConformance
from trtllm_core.testing.subject import STOPPING_CRITERION

Answer = tuple[Stop | None, ...]

PROBES = tuple((token,) for token in range(ALPHABET))
"""Tokens that might be chosen next: what a criterion says of each is its answer about a slot."""


class CriterionRig(Rig[Answer]):
    """A stopping criterion. Its answer about a slot is what it says of each of ``PROBES``."""

    padding = 0

    def wrapped(self, plugin: Any) -> SlotPlugin:
        """See ``Rig``, as all that follows."""
        if isinstance(plugin, HostStoppingCriterion):
            return HostCriterionAdapter(plugin, self.floor.history)
        require(isinstance(plugin, DeviceStoppingCriterion), f"it is a {type(plugin).__name__}, no stopping criterion")
        return plugin  # type: ignore[no-any-return]

    def answers(self, slots: Sequence[int]) -> dict[int, Answer]:
        said = [self.said(dict.fromkeys(slots, probe)) for probe in PROBES]
        return {slot: tuple(each[slot] for each in said) for slot in slots}

    def said(self, new: Mapping[int, Sequence[int]], bystanders: Sequence[int] = ()) -> dict[int, Stop | None]:
        """What it says of the tokens that a step chose, and has not committed yet."""
        if isinstance(self.acting, HostCriterionAdapter):
            stops = self.call(self.acting.check_rows, list(new), [list(tokens) for tokens in new.values()])
        else:
            told = {**new, **dict.fromkeys(bystanders, (1,))}
            batch = self.floor.chosen(told, [slot in new for slot in told], self.scores())
            stops = self._stops(self.call(self.acting.check, batch), len(told))
        for stop, tokens in zip(stops, new.values(), strict=False):
            require(stop is None or isinstance(stop, Stop), f"check returned a {type(stop).__name__}, no Stop")
            if stop is not None:
                require(0 <= stop.at < len(tokens), f"it stops at token {stop.at} of {len(tokens)} new ones")
                require(stop.reason and isinstance(stop.reason, str), f"it stops for the reason {stop.reason!r}")
                require(stop.trim_text >= 0, f"it cuts {stop.trim_text} bytes from the text")
        return dict(zip(new, stops, strict=False))

    def _stops(self, at: Any, rows: int) -> list[Stop | None]:
        plugin = self.acting
        good = isinstance(at, torch.Tensor) and at.shape == (rows,) and at.dtype == torch.int64
        require(good, f"check returned {at!r}, not int64 [{rows}]")
        return [None if where < 0 else Stop(plugin.reason, where, plugin.counted) for where in at.tolist()]

    def stops(self, new: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """See ``Rig``."""
        said = self.said(new).items()
        return {slot: stop.at + 1 for slot, stop in said if stop is not None}

    def difference(self, one: Answer, other: Answer) -> str:
        """See ``Rig``."""
        for probe, found, due in zip(PROBES, one, other, strict=True):
            if found != due:
                return f"of new tokens {list(probe)} it says {found}, not {due}"
        return ""


class StoppingCriterionConformance(SlotConformance[CriterionRig]):
    """Subclass it and set ``plugin``."""

    kind = STOPPING_CRITERION
    rig = CriterionRig

    offers = frozenset({"text", "logits"})

    def on_device(self) -> bool:
        """See ``SlotConformance``."""
        return isinstance(self.subject().make(), DeviceStoppingCriterion)

    def question(self, rig: CriterionRig, slots: Sequence[int]) -> Callable[[], torch.Tensor]:
        """See ``SlotConformance``."""
        batch = rig.floor.chosen({slot: PROBES[slot] for slot in slots}, scores=rig.scores())
        ask: Callable[[], torch.Tensor] = functools.partial(rig.acting.check, batch)
        return ask

    def test_declarations(self) -> None:
        """Scope, reason and capabilities are what the core reads."""
        plugin = self.subject().make()
        require(plugin.scope in ("row", "request"), f"its scope is {plugin.scope!r}, neither row nor request")
        require(isinstance(plugin.capabilities, StoppingCapabilities), "its capabilities are no StoppingCapabilities")
        if isinstance(plugin, DeviceStoppingCriterion):
            reason = getattr(plugin, "reason", None)
            require(isinstance(reason, str) and reason, f"its reason is {reason!r}; say in a word why a row ends")
        elif self.speculates():
            require(
                type(plugin).take_back is not HostStoppingCriterion.take_back,
                f'it declares speculation="{plugin.capabilities.speculation}", but cannot take tokens back: '
                "write take_back",
            )

    def test_it_stops(self) -> None:
        """With the parameters tried, some text ends, or some time; else the other checks see little. A step takes a
        second here, and no time elsewhere: what is compared must be asked at one moment."""
        for seed in range(self.lives):
            life = self.life(seed)
            for _ in range(20):
                if any(stop for answer in life.rig.answers(list(life.rig.branches)).values() for stop in answer):
                    return
                life.commit()
                life.rig.floor.now += 1
        passed_over("no text that was tried ended: give `params` or `sampling` with which some do")

    def test_where_it_stops_does_not_depend_on_the_steps(self) -> None:
        """A text ends at the same token, for the same reason, whether its tokens come alone or several at once."""
        self.skip_unless_it_speculates()
        for seed in range(4 * self.lives):
            life = self.life(seed)
            rig, other = life.rig, life.rig.replayed()
            texts = {slot: life.tokens(6) for slot in rig.branches}
            at_once = rig.said(texts)
            one_by_one: dict[int, Stop] = {}
            for at in range(6):
                going = {slot: text[at : at + 1] for slot, text in texts.items() if slot not in one_by_one}
                for slot, stop in other.said(going).items():
                    if stop is not None:
                        one_by_one[slot] = _moved(stop, at)
                going = {slot: tokens for slot, tokens in going.items() if slot not in one_by_one}
                if not going:
                    break
                other.commit(going)
            for slot, stop in at_once.items():
                due = one_by_one.get(slot)
                text = f"{list(rig.branches[slot].text)} + {texts[slot]}"
                require(stop == due, f"of tokens that come at once it says {stop}, one by one {due} (text {text})")

    def test_rows_of_others(self) -> None:
        """Rows that are not ``active`` are passed over."""
        if not self.on_device():
            passed_over("a host criterion is asked for its own rows only")
        for seed in range(self.lives):
            life = self.life(seed)
            rig, new = life.rig, {slot: life.tokens(2) for slot in life.rig.branches}
            due = rig.said(new)
            found = rig.said(new, life.BYSTANDERS)
            require(found == due, f"beside rows that did not ask for it, it says {found}, not {due}")

    def test_text_that_is_held_back(self) -> None:
        """``pending_text`` is a number of bytes, at most all of the text."""
        if self.on_device():
            passed_over("a device criterion holds no text back")
        for seed in range(self.lives):
            life = self.life(seed)
            text = life.rig.floor.context.text
            for _ in range(6):
                life.commit()
                for slot, branch in life.rig.branches.items():
                    held = life.rig.acting.pending_text(slot)
                    most = len(text(branch.generated))
                    require(
                        isinstance(held, int) and 0 <= held <= most,
                        f"pending_text holds {held!r} bytes back of a text of {most}",
                    )


def _moved(stop: Stop, by: int) -> Stop:
    return Stop(stop.reason, stop.at + by, stop.counted, stop.trim_text, stop.matched)
