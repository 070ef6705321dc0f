"""The live branches of a session, and everything that is kept for them by slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trtllm_core.config import EngineConfig
from trtllm_core.decoding.choice import Choice, Outcome
from trtllm_core.decoding.choosing import Choosers
from trtllm_core.decoding.companion_prompts import check_prompts
from trtllm_core.decoding.companions import Beside, Companions
from trtllm_core.decoding.conditions import Conditions
from trtllm_core.decoding.detokenizer import TextStream, TokenBytes
from trtllm_core.decoding.gathering import Gathering
from trtllm_core.decoding.hosting import Host, Samplers
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.pipeline import LogitsPipeline
from trtllm_core.decoding.plan import Plan, PlanItem
from trtllm_core.decoding.planner import Planner
from trtllm_core.decoding.positions import Drafts
from trtllm_core.decoding.random import slot_key
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.decoding.slots import Slots
from trtllm_core.decoding.stages import Stages
from trtllm_core.decoding.stopping import StoppingRules, Verdict
from trtllm_core.decoding.telling import append, as_they_stand, ends
from trtllm_core.errors import ConfigError, PluginError
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import BranchView, Hypothesis, Stop


class BranchTable:
    """Begins, commits, forks and ends branches: slots, plugins and text stay in step with each other."""

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        planner: Planner,
        end_ids: tuple[int, ...],
        token_bytes: TokenBytes | None = None,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
        look_ahead: bool = False,
    ) -> None:
        build = config.build
        self._config = config
        self.planner = planner
        self.end_ids = end_ids
        self.slots = Slots(
            build.max_branches,
            build.max_seq_len,
            config.model.vocab_size,
            config.vocab_size_padded,
            device,
            token_bytes,
            clock,
            apart=look_ahead,
        )
        self.conditions = Conditions(build.max_branches)
        self.gathering = Gathering()
        self.companions = Companions(build.max_branches, device)
        context, history = self.slots.context, self.slots.history
        self.pipeline = LogitsPipeline(context, build.max_branches, history, debug)
        self.samplers = Samplers(context)
        self.host = Host(self.pipeline, self.samplers, self.companions)
        self.choosers = Choosers(context, self.host)
        self.rules = StoppingRules(context, history)
        self.stages: tuple[Stages[Any], ...] = (self.pipeline, self.samplers, self.choosers, self.rules)
        """The kinds of plugins at work."""
        self.live: dict[int, Branch] = {}
        """The branches that run, by slot."""
        self.owners: dict[int, LiveRequest] = {}
        """The requests, by slot, resting slots included."""
        self.unborn: dict[int, LiveRequest] = {}
        """Requests with branches that begin when the prompt is through, by the slot that runs it."""
        self.verifying: set[int] = set()
        """Slots of requests that may verify drafts."""
        self.drafts = Drafts(build.max_branches, device)
        self._token_bytes = token_bytes
        self._left: list[int] = []
        self.streams: set[int] = set()
        """Slots of requests that want text."""
        self._scored: set[int] = set()  # slots of requests that asked for log-probabilities

    @property
    def wants_log_probs(self) -> bool:
        """Whether any request at work asked for log-probabilities."""
        return bool(self._scored)

    @property
    def wants_logits(self) -> bool:
        """Whether a plugin at work needs the logits that tokens are chosen from, beside choosing."""
        return any(stages.wants_logits for stages in self.stages)

    @property
    def on_device(self) -> bool:
        """Whether a step needs the host for nothing between its logits and the commit of one token a row."""
        if self.unborn or self.verifying or self.companions or self.samplers.live:
            return False
        told = self._scored or self.gathering or self.conditions.replaces_tokens
        return not told and self.pipeline.on_device and self.choosers.on_device

    def plan(self, request: Request, beside: Iterable[PlanItem] = ()) -> Plan:
        """The plan of a request; ``beside`` as for ``Planner.plan``."""
        if request.text and self._token_bytes is None:
            raise ConfigError("text was asked for, but the engine has no tokenizer")
        plan = self.planner.plan(request.sampling, request.processors, request.criteria, beside, request.prompt)
        check_prompts(plan.companions, request, self._config)
        return plan

    # -- beginning -----------------------------------------------------------------------------------------------

    def slots_of(self, live: LiveRequest) -> list[int]:
        """The slots that a request still has, those of its companions included."""
        return [slot for slot in (*live.slots, *live.companions) if self.owners.get(slot) is live]

    def begin(self, live: LiveRequest) -> None:
        """Everything that is kept by slot learns of the branches. A plugin that fails ends the request at once.

        Raises:
            ConfigError: a plugin refuses what the request asks of it. ``release`` its slots then.
        """
        request, plan = live.request, live.plan
        end_ids = self.end_ids if request.sampling.end_id is None else request.sampling.end_id
        for number, slot in enumerate(live.slots):
            self.owners[slot] = live
            if plan.positions > 1:
                self.verifying.add(slot)
            if request.text:
                self.streams.add(slot)
            if plan.log_probs:
                self._scored.add(slot)
            self.slots.begin(slot, request.prompt, slot_key(request.seed, number), live.most)
            self.conditions.begin(slot, request)
            self.gathering.begin(slot, request, None if number else live.scores)
            if number < plan.branching.branches:
                stream = TextStream(self._token_bytes) if request.text and self._token_bytes is not None else None
                live.unborn.append(Branch(live, slot, number, stream=stream))
        for slot, prompt in live.companions.items():
            self.owners[slot] = live
            self.slots.begin(slot, prompt, 0, live.most + len(prompt) - len(request.prompt))
            self.conditions.begin(slot, request)
        self.companions.begin(live.slots, tuple(live.companions), plan.companions)
        first = live.unborn.pop(0)
        live.running.append(first)
        self.live[first.slot] = first
        if live.unborn:
            self.unborn[first.slot] = live
        try:
            for number, slot in enumerate(live.slots):
                view = BranchView(
                    request.request_id, number, slot, request.prompt, request.sampling, end_ids, request.seed
                )
                self.pipeline.begin(plan.processors, view)
                if plan.sampler is not None:
                    self.samplers.begin((plan.sampler,), view)
                self.choosers.begin((plan.decoder,), view)
                self.rules.begin(plan.criteria, view)
        except PluginError as error:
            live.error = error

    def born(self, slots: list[int], cache: KVCache, beside: Beside | None = None) -> list[int]:
        """Prompts are through: the other branches of their requests begin, and share the prompt's cache.

        They were begun like the first, so that nothing but the cache is forked. The slots that begin are appended to
        ``slots``, and their companions to those ``beside``.

        Returns:
            For each of them, the place in ``slots`` of the branch whose logits are theirs, too.
        """
        rows: list[int] = []
        src, dst = [], []
        for row, slot in enumerate(tuple(slots)):
            live = self.unborn.pop(slot, None)
            if live is None:
                continue
            for branch in live.unborn:
                self.live[branch.slot] = branch
                src.append(slot)
                dst.append(branch.slot)
                rows.append(row)
            live.running += live.unborn
            live.unborn = []
        if dst:
            sources, copies = self.companions.with_pairs(src, dst)
            cache.fork(np.array(sources), np.array(copies))
            if beside is not None:
                own = len(dst)
                beside.rows.update((b, beside.rows[a]) for a, b in zip(sources[own:], copies[own:], strict=True))
            slots += dst
        return rows

    # -- ending --------------------------------------------------------------------------------------------------

    def leave(self, branch: Branch, reason: str, stop: Stop | None) -> None:
        """A branch has ended, its request maybe not."""
        live = branch.owner
        live.hypotheses.append(branch.hypothesis(reason, stop))
        live.running.remove(branch)
        del self.live[branch.slot]
        self._left += (branch.slot, *self.companions.of.get(branch.slot, ()))

    def end(self, live: LiveRequest, reason: str | None, told: Collection[int] = ()) -> list[Delta]:
        """A request is over.

        Args:
            live: the request.
            reason: why, where it ends around branches that have not ended.
            told: slots of branches whose end was told.
        """
        self._left += [slot for slot in self.slots_of(live) if slot not in self._left]
        ranked, deltas = live.plan.ranked, []
        if live.over:  # in a step that failed afterwards
            return []
        for branch in (*live.running, *live.unborn):
            if branch.slot not in told:
                text = branch.say_last((), None)
                deltas += [] if ranked else [append(branch, (), (), text, reason)]
        around = reason is not None and bool(live.running or live.unborn)
        live.sequences = as_they_stand(live, reason or "") if around else self._finalize(live)
        if ranked:
            deltas += ends(live)
        live.running, live.unborn = [], []
        return deltas

    def _finalize(self, live: LiveRequest) -> tuple[Hypothesis, ...]:
        """What the user gets of a request whose branches have all ended."""
        if not live.plan.ranked:
            return tuple(sorted(live.hypotheses, key=lambda one: one.branch))
        try:
            return self.choosers.finalize(live)
        except PluginError as error:
            live.error = error
            failed = tuple(replace(one, reason="plugin_error") for one in live.hypotheses)
            return failed[: live.plan.branching.returns]

    def settle(self, choice: Choice, verdict: Verdict, scores: torch.Tensor) -> Outcome:
        """See ``Choosers.settle``."""
        return self.choosers.settle(choice, verdict, scores if self.wants_log_probs else None, self.owners)

    def take_left(self) -> list[int]:
        """Slots whose branches or requests ended since the last call, and that are not released yet."""
        left, self._left = self._left, []
        return left

    def release(self, slot: int) -> None:
        """Forget what is in a slot."""
        owner = self.owners.pop(slot, None)
        self.live.pop(slot, None)
        self.unborn.pop(slot, None)
        self.verifying.discard(slot)
        self._scored.discard(slot)
        self.streams.discard(slot)
        for stages in self.stages:
            for name, seconds in stages.end(slot).items():
                if owner is not None:
                    owner.plugin_seconds[name] = owner.plugin_seconds.get(name, 0.0) + seconds
        self.companions.end(slot)
        self.conditions.end(slot)
        self.gathering.end(slot)
        self.slots.give(slot)

    def plugin_seconds(self) -> dict[str, float]:
        """Host time by plugin since the session began."""
        total: dict[str, float] = {}
        for stages in self.stages:
            for name, seconds in stages.seconds().items():
                total[name] = total.get(name, 0.0) + seconds
        return total
