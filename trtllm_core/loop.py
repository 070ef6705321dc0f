"""``StepLoop``: one engine execution, and the choice of tokens after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress

import numpy as np
import torch

from trtllm_core.decoding.admitting import admit, put_off, take_up
from trtllm_core.decoding.beginning import born
from trtllm_core.decoding.branches import BranchTable
from trtllm_core.decoding.committing import commit, take_failures
from trtllm_core.decoding.ending import end
from trtllm_core.decoding.flight import Ahead, Flight
from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.looking import Looks
from trtllm_core.decoding.plan import Plan, PlanItem
from trtllm_core.decoding.positions import Positions, with_copies
from trtllm_core.decoding.proposing import propose
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.decoding.resting import with_resting
from trtllm_core.decoding.tail import choose, commit_ahead
from trtllm_core.decoding.tails import Tails
from trtllm_core.errors import PluginError
from trtllm_core.feeding import Feed, Newest, Rows
from trtllm_core.host_threads import few_threads
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.padding import PaddedRuns
from trtllm_core.plugin import Plugins
from trtllm_core.session import Session


class StepLoop:
    """Runs steps. Who runs in one, and when a request may start, is the caller's to say.

    The road of a step: make room → run the engine → process the logits → choose → check for ends → settle what goes
    on → commit. Up to ``settle`` nothing changes; state moves in ``commit`` alone.
    """

    def __init__(
        self, session: Session, cache: KVCache, branches: BranchTable, plugins: Plugins, look_ahead: bool = False
    ) -> None:
        config = session.config
        self.session = session
        packed = session.config.contract == "packed_paged"
        self.engine: Session | PaddedRuns = session if packed else PaddedRuns(session)
        self.branches = branches
        self.plugins = plugins
        self.steps = 0
        self._vocab_size = config.model.vocab_size
        self._logits = torch.zeros(config.build.max_branches, config.vocab_size_padded, device=session.device)
        self._offsets = torch.zeros(config.build.max_branches, dtype=torch.int64, device=session.device)
        self._slot = torch.zeros_like(self._offsets)
        self._at: Positions | None = None  # of the last step without drafts
        self._newest: Flight | None = None  # launched, and not landed
        self._look_ahead = look_ahead
        self._tails = Tails(branches) if look_ahead and session.device.type == "cuda" else None
        self.use(cache)

    def use(self, cache: KVCache) -> None:
        """Run on this cache from now on. Nothing may run while it changes."""
        build = self.session.config.build
        self.cache = cache
        # A policy that moves and drops entries after a step looks at tokens that are known by then.
        self._may_look_ahead = self._look_ahead and not cache.settles
        self.branches.host.looks = Looks(self.session, cache, self.branches.conditions)
        self._feed = Feed(build.max_branches, build.max_num_tokens, cache, self.branches)

    def check(self, request: Request, beside: Iterable[PlanItem] = ()) -> Plan:
        """The plan of a request that has not started. Changes nothing; ``beside`` as for ``Planner.plan``.

        Raises:
            ConfigError, PluginError: its plan cannot be made.
            CapacityError: the cache could not hold it even alone.
        """
        plan, sampling = self.branches.plan(request, beside), request.sampling
        self.cache.check_window(sampling.max_attention_window_size, sampling.sink_token_length)
        most, companions = plan.branching.max_branches, [len(each) for one in plan.companions for each in one.prompts]
        self.cache.check(len(request.prompt), sampling.max_new_tokens, sampling.cache_priority, most, companions)
        return plan

    @torch.inference_mode()
    def admit(self, request: Request, plan: Plan | None = None) -> LiveRequest | None:
        """Give a request slots, its plugins their state and its prompt its room; None: not now, none is free.

        ``plan`` is its own, made alone, where there is one already. One whose plugins failed comes back with ``error``
        set: ``end`` it.

        Raises:
            CapacityError: it could not run even alone.
            ConfigError, PluginError: its plan cannot be made, or a plugin refuses what it asks for.
        """
        return admit(self.branches, request, self.cache, plan)

    @torch.inference_mode()
    def preempt(self, live: LiveRequest) -> None:
        """Take a running request's cache away, between two steps. Its slots, text and plugins' state stay as they are.

        What it had computed is left for reuse, where the policy keeps such things.
        """
        put_off(self.branches, live, self.cache)

    @torch.inference_mode()
    def resume(self, live: LiveRequest) -> bool:
        """Give a preempted request room again, if there is some: the next steps compute its text anew, and go on."""
        return take_up(self.branches, live, self.cache)

    def reserve(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Make room for what ``step`` is going to run, in slots that rest too.

        Raises:
            OutOfBlocksError: there is none, and nothing was changed. Preempt somebody.
        """
        slot, count = np.asarray(slots, np.int64), np.asarray(counts, np.int64)
        self.cache.extend(*with_resting(self.branches, self.cache, slot, count))

    @property
    def looks_ahead(self) -> bool:
        """Whether the next step may be launched before the last one has landed."""
        return self._may_look_ahead and self.branches.on_device

    def step(self, slots: Sequence[int], counts: Sequence[int]) -> list[Delta]:
        """``launch`` a step, and ``land`` it."""
        flight = self.launch(slots, counts)
        return [] if flight is None else self.land(flight)

    @torch.inference_mode()
    def launch(self, slots: Sequence[int], counts: Sequence[int]) -> Flight | None:
        """Run ``counts[i]`` tokens of each slot, and choose a next one where the last known token was among them.

        A branch may run more than it has: drafts that ``propose`` found. Then it gets as many tokens as are accepted.
        One with companions runs its last known token in a step with theirs: see ``Companions.share``. And while
        ``looks_ahead``, one may run the token that the flight before this one is about to bring.

        Returns:
            The step, which must ``land``; None: nobody gets a token from it.
        """
        rows = self._rows(slots, counts)
        self.cache.extend(rows.slots, rows.counts)
        logits = self._run(rows)
        self.cache.commit(rows.slots, rows.counts)
        self.cache.settle(rows.slots, rows.counts)
        self.steps += 1
        with few_threads(self.session.engine.own_threads, logits.numel()):
            self._newest = self._ask(rows, logits) if rows.asking.any() else None
        return self._newest

    @torch.inference_mode()
    def land(self, flight: Flight) -> list[Delta]:
        """Wait for a step's tokens, and for nothing that was launched after it: who ends, and what there is to tell.

        Rows of branches that ended since the launch are passed over: a step that looked ahead knew nothing of it.
        """
        if self._newest is flight:
            self._newest = None
        branches, chosen = self.branches, flight.chosen
        table, slots = flight.coming.wait(), chosen.choice.slots
        if flight.ahead is not None:
            slots = flight.slots
            here = [branches.live.get(slot) is one for slot, one in zip(slots, flight.ahead.branches, strict=True)]
            if not all(here):
                table, slots = table[here], list(compress(slots, here))
            branches.slots.ahead[slots] -= 1
        verdict = branches.rules.conclude(chosen.asked, table, slots)
        # Who wants log-probabilities keeps steps from looking ahead: of such a step nobody asked for any.
        scores = chosen.scores if flight.ahead is None and branches.wants_log_probs else None
        outcome = branches.choosers.settle(replace(chosen.choice, slots=slots), verdict, scores, branches.owners)
        deltas = commit(branches, self.cache, outcome, flight.failures, flight.ahead)
        if flight.drafts is not None:
            self._take_back(np.array(flight.slots), flight.drafts)
        self._release()
        return deltas

    def forget(self) -> None:
        """Steps that have not landed bring nothing to anybody any more: all that they ran have ended."""
        self._newest = None

    @torch.inference_mode()
    def end(self, live: LiveRequest, reason: str) -> list[Delta]:
        """End a request around its branches: they stay as they are, with ``reason``."""
        deltas = end(self.branches, live, reason)
        self._release()
        return deltas

    @torch.inference_mode()
    def propose(self, slots: Sequence[int]) -> np.ndarray:
        """Ask for drafts for branches that generate, where their requests may verify some, before ``step``.

        Returns:
            int64: how many tokens each slot may run beside those that it has. A step may run fewer.
        """
        propose(self.branches, slots)
        return self.branches.drafts.counts[np.asarray(slots, np.int64)]

    def _ask(self, rows: Rows, logits: torch.Tensor) -> Flight:
        """Next tokens for the asking rows from their raw logits, float32 ``[n, vocab_size_padded]``."""
        branches, slots, drafts = self.branches, rows.slots[rows.asking].tolist(), rows.drafts
        beside = None
        if branches.companions:
            slots, logits, drafts, beside = branches.companions.parted(slots, logits, drafts)
        if branches.unborn and (parents := born(branches, slots, self.cache, beside)):
            logits, drafts = with_copies(logits, drafts, parents)
        at = self._positions(slots, drafts)
        branches.gathering.note(at.slots_by_position, logits)
        branches.pipeline.prepare(at)
        shown = None if beside is None else branches.companions.shown(at.slots_by_position, beside)
        if not self.looks_ahead:
            chosen = choose(branches, logits, at, shown)
            return Flight(chosen, branches.rules.send(chosen.asked), slots, drafts, take_failures(branches))
        return self._ask_ahead(logits, at)

    def _ask_ahead(self, logits: torch.Tensor, at: Positions) -> Flight:
        """The same where the device commits what it chooses."""
        branches, failed = self.branches, dict[LiveRequest, PluginError]()
        captured = None if self._tails is None else self._tails.run(logits, at)
        if captured is None:
            chosen = choose(branches, logits, at)
            failed = take_failures(branches)
            captured = chosen, commit_ahead(branches, chosen)
        chosen, tokens = captured
        rows = tuple(branches.live[slot] for slot in at.slots)
        branches.slots.ahead[at.slots] += 1
        ahead = Ahead(rows, tokens, take_failures(branches))
        return Flight(chosen, branches.rules.send(chosen.asked), at.slots, None, failed, ahead)

    def _positions(self, slots: list[int], drafts: np.ndarray | None) -> Positions:
        if drafts is not None:
            return self.branches.drafts.positions(slots, drafts.tolist())
        if self._at is None or self._at.slots != slots:  # from step to step it is nearly always the same
            slot = self._slot[: len(slots)].copy_(torch.tensor(slots), non_blocking=True)
            self._at = Positions(slots, slot, self._offsets[: len(slots)])
        return self._at

    def _take_back(self, slots: np.ndarray, drafts: np.ndarray) -> None:
        """Drafts that were run and not accepted leave the cache."""
        over = self.cache.cached[slots] - self.branches.slots.lengths[slots] + 1
        for slot, drafted, refused in zip(slots.tolist(), drafts.tolist(), over.tolist(), strict=True):
            owner = self.branches.owners[slot]
            owner.drafted += drafted
            owner.accepted += max(drafted - refused, 0)
        going = (over > 0) & np.isin(slots, list(self.branches.live))
        if going.any():
            self.cache.rewind(slots[going], over[going])

    def _release(self) -> None:
        """What has ended leaves: its slots and blocks are free at once. What ended well is left for others to reuse."""
        left = np.array(self.branches.take_left(), np.int64)
        if not len(left):
            return
        keep = np.array([self.branches.owners[slot].ended_well for slot in left.tolist()])
        over = np.maximum(self.cache.cached[left] - self.branches.slots.lengths[left], 0)
        if (over[keep] > 0).any():  # drafts behind a stop: what is kept must be the text
            self.cache.rewind(left[keep & (over > 0)], over[keep & (over > 0)])
        self.branches.release(left.tolist())
        for kept in (True, False):
            if (keep == kept).any():
                self.cache.release(left[keep == kept], kept)

    def _rows(self, slots: Sequence[int], counts: Sequence[int]) -> Rows:
        slot, count = np.asarray(slots, np.int64), np.asarray(counts, np.int64)
        known = self.branches.slots.lengths[slot] + self.branches.slots.ahead[slot]
        left = known - self.cache.cached[slot] - count
        if not left.any():
            return Rows(slot, count, left == 0, steady=bool((count == 1).all()))
        if left.min() >= 0:
            return Rows(slot, count, left == 0)
        for each, length, drafted in zip(slots, known.tolist(), (-left).tolist(), strict=True):
            if drafted > 0:
                assert drafted <= self.branches.drafts.counts[each], "a step cannot run tokens that are not there"
                self.branches.slots.tokens[each, length : length + drafted] = self.branches.drafts.of(each, drafted)
        asking = left <= 0
        return Rows(slot, count, asking, -left[asking])

    def _run(self, rows: Rows) -> torch.Tensor:
        """Logits of the asking rows' positions, float32 ``[n, vocab_size_padded]``."""
        last = self._newest
        ahead = None if last is None or last.ahead is None else Newest(last.slots, last.ahead.tokens)
        fed = self._feed.fill(rows, ahead)
        if fed.prompts is not None:
            logits = torch.empty(fed.given, self._logits.shape[1], device=self.session.device)
        else:
            if fed.given > len(self._logits):  # a verify step, with more positions than any before
                self._logits = self._logits.new_zeros(1 << (fed.given - 1).bit_length(), self._logits.shape[1])
            logits = self._logits[: fed.given]
        self.engine.run(fed.inputs, {"logits": logits})
        if self._vocab_size < logits.shape[1]:
            logits[:, self._vocab_size :] = torch.finfo(torch.float32).min
        if fed.prompts is None:
            return logits
        assert fed.chosen_from is not None
        places = (torch.from_numpy(place).to(logits.device) for place in (fed.prompts.place, fed.chosen_from))
        kept, chosen_from = (logits[place] for place in places)
        self.branches.gathering.keep(fed.prompts.owner, fed.prompts.position, kept)
        return chosen_from
