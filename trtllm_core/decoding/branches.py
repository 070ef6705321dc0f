"""The live branches of a session, and everything that is kept for them by slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from trtllm_core.config import EngineConfig
from trtllm_core.decoding.choosing import Choosers
from trtllm_core.decoding.companion_prompts import check_prompts
from trtllm_core.decoding.companions import Companions
from trtllm_core.decoding.conditions import Conditions
from trtllm_core.decoding.detokenizer import TokenBytes
from trtllm_core.decoding.gathering import Gathering
from trtllm_core.decoding.hosting import Host, Samplers
from trtllm_core.decoding.live import Branch, LiveRequest
from trtllm_core.decoding.pipeline import LogitsPipeline
from trtllm_core.decoding.plan import Plan, PlanItem
from trtllm_core.decoding.planner import Planner
from trtllm_core.decoding.positions import Drafts
from trtllm_core.decoding.request import Request
from trtllm_core.decoding.slots import Slots
from trtllm_core.decoding.stages import Stages
from trtllm_core.decoding.stopping import StoppingRules
from trtllm_core.errors import ConfigError


class BranchTable:
    """What is kept for branches: slots, plugins and text. ``beginning``, ``committing`` and ``ending`` keep them in
    step with each other."""

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
        self.waiting: set[int] = set()
        """Slots of requests whose steps need the host: see ``needs_host``."""
        self.drafts = Drafts(build.max_branches, device)
        self.token_bytes = token_bytes
        self.left: list[int] = []
        """Slots whose branches or requests have ended, and that are not released yet."""
        self.streams: set[int] = set()
        """Slots of requests that want text."""
        self.scored: set[int] = set()
        """Slots of requests that asked for log-probabilities."""

    @property
    def wants_log_probs(self) -> bool:
        """Whether any request at work asked for log-probabilities."""
        return bool(self.scored)

    @property
    def wants_logits(self) -> bool:
        """Whether a plugin at work needs the logits that tokens are chosen from, beside choosing."""
        return any(stages.wants_logits for stages in self.stages)

    @property
    def on_device(self) -> bool:
        """Whether a step needs the host for nothing between its logits and the commit of one token a row."""
        return not (self.waiting or self.unborn)

    @property
    def graph_key(self) -> Hashable:
        """What the device code of all plugins at work depends on; None: some of it cannot be captured as a graph."""
        keys = self.pipeline.graph_key, self.choosers.graph_key, self.rules.graph_key
        return None if None in keys else (*keys, self.wants_logits)

    def plan(self, request: Request, beside: Iterable[PlanItem] = ()) -> Plan:
        """The plan of a request; ``beside`` as for ``Planner.plan``."""
        if request.text and self.token_bytes is None:
            raise ConfigError("text was asked for, but the engine has no tokenizer")
        plan = self.planner.plan(request.sampling, request.processors, request.criteria, beside, request.prompt)
        check_prompts(plan.companions, request, self._config)
        return plan

    def slots_of(self, live: LiveRequest) -> list[int]:
        """The slots that a request still has, those of its companions included."""
        return [slot for slot in (*live.slots, *live.companions) if self.owners.get(slot) is live]

    def take_left(self) -> list[int]:
        """Slots whose branches or requests ended since the last call, and that are not released yet."""
        left, self.left = self.left, []
        return left

    def release(self, slots: Sequence[int]) -> None:
        """Forget what is in some slots."""
        owners = [self.owners.pop(slot, None) for slot in slots]
        for stages in self.stages:
            for owner, spent in zip(owners, stages.end(slots), strict=True):
                for name, seconds in spent.items():
                    if owner is not None:
                        owner.plugin_seconds[name] = owner.plugin_seconds.get(name, 0.0) + seconds
        for slot in slots:
            self.live.pop(slot, None)
            self.unborn.pop(slot, None)
            self.verifying.discard(slot)
            self.waiting.discard(slot)
            self.scored.discard(slot)
            self.streams.discard(slot)
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
