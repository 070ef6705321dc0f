"""Plugins at work: which slots use which, in what order, and what happens when one fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from trtllm_core.decoding.host import HostAdapter
from trtllm_core.decoding.plan import PlanItem
from trtllm_core.decoding.state import Everybody
from trtllm_core.errors import BranchError, ConfigError, PluginError, PluginRuntimeError
from trtllm_core.plugin import BranchView, CommitBatch, DecodingContext
from trtllm_core.plugin.lifecycle import SlotPlugin

P = TypeVar("P", bound=SlotPlugin)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Scores:
    """The processed logits of a step, and which of its tokens came from which."""

    logits: torch.Tensor
    """float32 ``[m, vocab_size_padded]``."""
    source: torch.Tensor
    """int64 ``[n, k]``: the row of ``logits`` that each token was chosen from."""


@dataclass(frozen=True, slots=True)
class CommittedRows:
    """What a step commits, on the device."""

    slot: torch.Tensor
    """int64 ``[n]``."""
    tokens: torch.Tensor
    """int64 ``[n, k]``."""
    counts: torch.Tensor
    """int64 ``[n]``."""
    scores: Scores | None = None
    """Where the tokens came from; needed where a plugin asks for logits."""

    def batch(self, stage: Stage[Any]) -> CommitBatch:
        """What a device plugin is shown."""
        return stage.commit_batch(self.slot, self.tokens, self.counts, self.scores)


class Stage(Generic[P]):
    """One plugin of a session and the slots that use it."""

    def __init__(self, item: PlanItem, plugin: P, context: DecodingContext, everybody: Everybody) -> None:
        self.item = item
        self.name = item.name
        self.plugin = plugin
        self.context = context
        self.flags = torch.zeros(context.slots, dtype=torch.bool, device=context.device)
        """bool ``[slots]``: what ``members`` says, on the device."""
        self.members: set[int] = set()
        self.total = False
        """Whether all slots at work are members: then ``flags`` need no look."""
        self.follows = getattr(plugin.commit, "__func__", None) is not SlotPlugin.commit
        """Whether it wants to know what was committed."""
        self._everybody = everybody
        self.wants_logits = "logits" in getattr(getattr(item.plugin, "capabilities", None), "needs", ())
        self.seconds = 0.0
        """Host time spent in the plugin since the session began."""
        self._share = 0.0  # what a member from the beginning on would have been charged: see ``call``
        self._joined: dict[int, float] = {}  # slot: the share at which its branch joined
        self.error: PluginError | None = None

    def call(self, function: Callable[..., R], *args: object) -> R:
        """Call the plugin, take the time, and give what it raises its name.

        The time is shared equally by the branches that use the plugin now. One division a call does for all of them:
        what a branch owes is the share when it leaves less the share when it joined.

        Raises:
            PluginError: chained to what the plugin raised.
        """
        start = time.perf_counter()
        try:
            return function(*args)
        except PluginError:
            raise
        except Exception as error:
            raise PluginRuntimeError(f"plugin {self.name!r} raised {type(error).__name__}: {error}") from error
        finally:
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self._share += seconds / (len(self.members) or 1)

    def active(self, slot: torch.Tensor) -> torch.Tensor:
        """bool ``[n]``: which rows, of the slots ``slot`` (int64 ``[n]``), are the plugin's."""
        return self._everybody.of(slot.shape[0]) if self.total else self.flags.index_select(0, slot)

    def commit_batch(
        self, slot: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, scores: Scores | None
    ) -> CommitBatch:
        """The step's tokens as this plugin is shown them: with the logits where it needs them."""
        active = self.active(slot)
        if scores is None or not self.wants_logits:
            return CommitBatch(self.context, slot, tokens, counts, active)
        return CommitBatch(self.context, slot, tokens, counts, active, scores.logits, scores.source)

    def begin(self, item: PlanItem, view: BranchView) -> None:
        """A branch joins. ``item`` is that of its own plan, with its own parameters.

        Raises:
            ConfigError: the plugin refuses what the request asks of it: the user's mistake, and told as one.
            PluginError: it raised anything else.
        """
        share, seconds = self._share, self.seconds
        try:
            self.call(self.plugin.begin, view.slot, item.view(view))
        except PluginRuntimeError as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise
        finally:
            self._share = share  # its beginning is the branch's own: the others do not pay for it
        self._joined[view.slot] = share - (self.seconds - seconds)
        self.members.add(view.slot)
        self.flags[view.slot].fill_(True)

    def end(self, slot: int) -> float:
        """A branch leaves, of which ``flags`` are to be told. Returns its part of the plugin's host time, in seconds.

        What the plugin raises now can hurt nobody any more: it is kept in ``error``.
        """
        self.members.discard(slot)
        share, seconds = self._share, self.seconds
        try:
            self.call(self.plugin.end, slot)
        except PluginError as error:
            self.error = error
        self._share = share
        return share - self._joined.pop(slot) + (self.seconds - seconds)


class Stages(Generic[P]):
    """All plugins of one kind in a session.

    A plugin that raises fails the slots that use it, which ``failures`` collects, and nobody else.
    """

    def __init__(self, context: DecodingContext, wrap: Callable[[Any], P]) -> None:
        self.context = context
        self.live: list[Stage[P]] = []
        """Stages that some slot uses, as they were registered: not as they came to be used, which depends on the
        company."""
        self.failures: dict[int, PluginError] = {}
        """Slot to what failed it, since ``take_failures``."""
        self.wants_logits = False
        """Whether a plugin at work needs the logits that tokens are chosen from, beside choosing."""
        self.graph_key: Hashable = ()
        """The plugins at work on the device, and what their code depends on; None: some of it cannot be captured as a
        CUDA graph."""
        self._all: dict[object, Stage[P]] = {}
        self._of: dict[int, list[Stage[P]]] = {}
        self._spent: dict[str, float] = {}  # seconds of stages that are gone
        self._wrap = wrap
        self._everybody = Everybody(context.slots, context.device)

    def begin(self, items: Iterable[PlanItem], view: BranchView) -> None:
        """A branch starts with these plugins. All of them begin, or none is left behind.

        Raises:
            ConfigError: one refuses what the request asks of it.
            PluginError: one could not be made or raised.
        """
        self._of[view.slot] = []
        try:
            for item in items:
                stage = self._stage(item)
                stage.begin(item, view)
                self._of[view.slot].append(stage)
        except Exception:
            self.end((view.slot,))
            raise
        finally:
            self._refresh()

    def commit_device(self, rows: CommittedRows) -> None:
        """Tokens were accepted: plugins of the device kind follow them."""
        for stage in self.live:
            if stage.follows and not isinstance(stage.plugin, HostAdapter):
                try:
                    stage.call(stage.plugin.commit, rows.batch(stage))
                except PluginError as error:
                    self.fail(stage, error)

    def commit_host(self, slots: Sequence[int], new: Sequence[Sequence[int]]) -> None:
        """Those of the host kind follow the same tokens: ``new[i]`` in ``slots[i]``."""
        for stage in self.live:
            if stage.follows and isinstance(stage.plugin, HostAdapter):
                try:
                    stage.call(stage.plugin.commit_rows, slots, new)
                    self._fail_branches(stage)
                except PluginError as error:
                    self.fail(stage, error)

    def fork(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """The state of slots ``dst`` becomes that of slots ``src``, all at the same time. All have begun alike."""
        device = self.context.device
        for stage in self.live:
            pairs = [(a, b) for a, b in zip(src, dst, strict=True) if a in stage.members]
            if not pairs:
                continue
            assert all(b in stage.members for _, b in pairs), "a branch begins before it becomes a copy"
            try:
                if isinstance(stage.plugin, HostAdapter):
                    stage.call(stage.plugin.fork_rows, *zip(*pairs, strict=True))
                else:
                    sides = (torch.tensor(side, device=device) for side in zip(*pairs, strict=True))
                    stage.call(stage.plugin.fork, *sides)
            except PluginError as error:
                self.fail(stage, error)

    def rewind(self, slot: int, n: int) -> None:
        """The last ``n`` tokens of a slot are taken back."""
        for stage in self._of.get(slot, ()):
            try:
                stage.call(stage.plugin.rewind, slot, n)
            except PluginError as error:
                self.fail(stage, error)

    def end(self, slots: Sequence[int]) -> list[dict[str, float]]:
        """Branches are over. Returns the part of each in each plugin's host time, in seconds by name."""
        spent: list[dict[str, float]] = []
        left: dict[Stage[P], list[int]] = {}
        for slot in slots:
            self.failures.pop(slot, None)  # nobody is left to be told
            seconds: dict[str, float] = {}
            for stage in self._of.pop(slot, []):
                seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.end(slot)
                left.setdefault(stage, []).append(slot)
            spent.append(seconds)
        several = torch.tensor(slots).to(self.context.device, non_blocking=True) if len(slots) > 2 else None
        for stage, gone in left.items():
            if several is not None and len(gone) == len(slots):
                stage.flags.index_fill_(0, several, False)
            else:
                for slot in gone:
                    stage.flags[slot].fill_(False)
        self._refresh()
        return spent

    def take_failures(self) -> dict[int, PluginError]:
        """The failures since the last call."""
        failures, self.failures = self.failures, {}
        return failures

    def seconds(self) -> dict[str, float]:
        """Host time by plugin since the session began. Objects of one name are counted together."""
        seconds = dict(self._spent)
        for stage in self._all.values():
            seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.seconds
        return seconds

    def fail(self, stage: Stage[P], error: PluginError) -> None:
        """All slots that use a plugin fail with it."""
        stage.error = error
        for slot in stage.members:
            self.failures.setdefault(slot, error)

    def _fail_branches(self, stage: Stage[P]) -> None:
        """What a host plugin raised about single branches fails these alone."""
        if isinstance(stage.plugin, HostAdapter) and stage.plugin.failed:
            for slot, error in stage.plugin.take_failed().items():
                told = BranchError(f"plugin {stage.name!r}: {error}")
                told.__cause__ = error
                self.failures.setdefault(slot, told)

    def _stage(self, item: PlanItem) -> Stage[P]:
        stage = self._all.get(item.key)
        if stage is None:
            stage = Stage(item, self._wrap(item.plugin), self.context, self._everybody)
            stage.call(stage.plugin.setup, self.context)
            self._all[item.key] = stage
        return stage

    def _refresh(self) -> None:
        for key, stage in list(self._all.items()):
            if stage.item.passed and not stage.members:  # the user's object: nothing here would use it again
                self._spent[stage.name] = self._spent.get(stage.name, 0.0) + stage.seconds
                del self._all[key]
        live = [stage for stage in self._all.values() if stage.members]
        self.live = sorted(live, key=lambda stage: stage.item.rank)
        for stage in live:
            stage.total = len(stage.members) == len(self._of)
        self.wants_logits = any(stage.wants_logits for stage in live)
        device = [stage for stage in self.live if not isinstance(stage.plugin, HostAdapter)]
        safe = all(stage.item.graph_safe for stage in device)
        self.graph_key = tuple((stage, stage.total, stage.plugin.graph_key) for stage in device) if safe else None
