"""The live branches of a session, and everything that is kept for them by slot."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from trtllm_core.config import EngineConfig
from trtllm_core.decoding.choosing import Choosers
from trtllm_core.decoding.detokenizer import TextStream, TokenBytes
from trtllm_core.decoding.pipeline import LogitsPipeline
from trtllm_core.decoding.plan import Planner
from trtllm_core.decoding.random import slot_key
from trtllm_core.decoding.request import Branch, Delta, Request
from trtllm_core.decoding.samplers import log_probs
from trtllm_core.decoding.slots import Slots
from trtllm_core.decoding.stages import CommittedRows, Stages
from trtllm_core.decoding.stopping import StoppingRules, Verdict
from trtllm_core.errors import ConfigError, PluginContractError, PluginError
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.plugin import BranchView, Selection


class BranchTable:
    """Begins, commits and ends branches: slots, plugins and text stay in step with each other."""

    def __init__(
        self,
        config: EngineConfig,
        device: torch.device,
        planner: Planner,
        end_ids: tuple[int, ...],
        token_bytes: TokenBytes | None = None,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        build = config.build
        self.planner = planner
        self.end_ids = end_ids
        self.slots = Slots(
            build.max_batch_size,
            build.max_seq_len,
            config.model.vocab_size,
            config.vocab_size_padded,
            device,
            token_bytes,
            clock,
        )
        context, history = self.slots.context, self.slots.history
        self.pipeline = LogitsPipeline(context, build.max_batch_size, history, debug)
        self.choosers = Choosers(context)
        self.rules = StoppingRules(context, history)
        self.live: dict[int, Branch] = {}
        self._token_bytes = token_bytes
        self._streams: dict[int, TextStream] = {}
        self._finished: list[Branch] = []

    @property
    def stages(self) -> tuple[Stages, Stages, Stages]:  # type: ignore[type-arg]
        """The three kinds of plugins at work."""
        return self.pipeline, self.choosers, self.rules

    @property
    def wants_log_probs(self) -> bool:
        """Whether any live branch asked for log-probabilities."""
        return any(branch.plan.log_probs for branch in self.live.values())

    def admit(self, request: Request, cache: KVCache) -> Branch | None:
        """See ``StepLoop.admit``."""
        beside = [stage.item for stage in self.pipeline.live]
        plan = self.planner.plan(request.sampling, request.processors, request.criteria, beside)
        if request.text and self._token_bytes is None:
            raise ConfigError("text was asked for, but the engine has no tokenizer")
        if not self.slots.free:
            return None
        slot = self.slots.take()
        try:
            sampling = request.sampling
            admission = cache.admit(
                slot, request.prompt, sampling.max_new_tokens, request.reuse_key, sampling.cache_priority
            )
            if admission is None:
                self.slots.give(slot)
                return None
        except BaseException:
            self.slots.give(slot)
            raise
        branch = self.live[slot] = Branch(request, plan, slot, cached_prompt=admission.hit_length)
        try:
            self._begin(branch)
        except BaseException:
            self.release(slot)
            cache.release(np.array([slot]))
            raise
        return branch

    def _begin(self, branch: Branch) -> None:
        """Everything that is kept by slot learns of a branch. A plugin that fails ends it at once."""
        request, plan, slot = branch.request, branch.plan, branch.slot
        self.slots.begin(slot, request.prompt, slot_key(request.seed, branch.number))
        end_ids = self.end_ids if request.sampling.end_id is None else request.sampling.end_id
        view = BranchView(
            request.request_id, branch.number, slot, request.prompt, request.sampling, end_ids, request.seed
        )
        if request.text:
            assert self._token_bytes is not None
            self._streams[slot] = TextStream(self._token_bytes)
        try:
            self.pipeline.begin(plan.processors, view)
            self.choosers.begin((plan.decoder,), view)
            self.rules.begin(plan.criteria, view)
        except PluginError as error:
            branch.finish("plugin_error", error=error)

    def commit(
        self, slots: np.ndarray, slot: torch.Tensor, scores: torch.Tensor, selection: Selection, verdict: Verdict
    ) -> list[Delta]:
        """The tokens of a step become history: on the device, in the plugins' state, and in what is told."""
        failures = self._failures()
        branches = [self.live[s] for s in slots.tolist()]
        new, counts = [], []
        for branch, tokens, stop in zip(branches, verdict.tokens, verdict.stops, strict=True):
            if branch.slot in verdict.wrong:
                what = f"decoder {branch.plan.decoder.name!r} {verdict.wrong[branch.slot]}"
                failures.setdefault(branch.slot, PluginContractError(what))  # one that failed before chose nothing
            if branch.slot in failures:
                branch.finish("plugin_error", error=failures[branch.slot])
                tokens = []
            elif stop is not None:
                branch.finish(stop.reason, stop)
                tokens = tokens[: stop.at + 1]
            new.append(tokens)
            counts.append(len(tokens))
        width = selection.tokens.shape[1]
        padded = np.array([row + [0] * (width - len(row)) for row in new], np.int64)
        count = torch.tensor(counts, device=slot.device)
        self.slots.commit(slot, selection.tokens, count)
        self.slots.record(slots, padded, np.array(counts))
        rows = CommittedRows(slot, selection.tokens, count, slots.tolist(), new, verdict.scores)
        for stages in self.stages:
            stages.commit(rows)
        held = [
            self.rules.pending(b.slot) if b.slot in self._streams and b.finish_reason is None else 0 for b in branches
        ]
        failures = self._failures() | failures  # of several failures of a branch, the first is told
        for branch in branches:
            if branch.slot in failures:
                branch.finish("plugin_error", error=failures.pop(branch.slot))
        deltas = self._tell(branches, new, held, self._log_probs(scores, selection))
        # What is left had no token to choose yet: its prompt is longer than a step.
        return deltas + [self.abort(number, "plugin_error", error) for number, error in failures.items()]

    def abort(self, slot: int, reason: str, error: Exception | None = None) -> Delta:
        """End a branch between steps."""
        branch = self.live[slot]
        branch.finish(reason, error=error)
        return self._tell([branch], [[]], [0], None)[0]

    def take_finished(self) -> list[Branch]:
        """Branches that ended since the last call, still in their slots."""
        finished, self._finished = self._finished, []
        return finished

    def release(self, slot: int) -> None:
        """Forget a branch."""
        branch = self.live.pop(slot)
        self._streams.pop(slot, None)
        for stages in self.stages:
            for name, seconds in stages.end(slot).items():
                branch.plugin_seconds[name] = branch.plugin_seconds.get(name, 0.0) + seconds
        self.slots.give(slot)

    def plugin_seconds(self) -> dict[str, float]:
        """Host time by plugin since the session began."""
        total: dict[str, float] = {}
        for stages in self.stages:
            for name, seconds in stages.seconds().items():
                total[name] = total.get(name, 0.0) + seconds
        return total

    def _failures(self) -> dict[int, PluginError]:
        return {slot: error for stages in self.stages for slot, error in stages.take_failures().items()}

    def _log_probs(self, scores: torch.Tensor, selection: Selection) -> list[list[float]] | None:
        if not self.wants_log_probs:
            return None
        given = selection.log_probs
        return (log_probs(scores, selection.tokens) if given is None else given).tolist()

    def _tell(
        self,
        branches: list[Branch],
        new: list[list[int]],
        held: list[int],
        log_probs: list[list[float]] | None,
    ) -> list[Delta]:
        deltas = []
        for i, (branch, tokens) in enumerate(zip(branches, new, strict=True)):
            branch.generated += tokens
            chances = log_probs[i][: len(tokens)] if log_probs is not None and branch.plan.log_probs else []
            branch.log_probs += chances
            text = self._text(branch, tokens, held[i])
            branch.text += text
            deltas.append(
                Delta(
                    branch.request.request_id, tuple(tokens), text, branch.finish_reason, tuple(chances), branch.error
                )
            )
            if branch.finish_reason is not None:
                self._finished.append(branch)
        return deltas

    def _text(self, branch: Branch, tokens: list[int], held: int) -> str:
        stream = self._streams.get(branch.slot)
        if stream is None:
            return ""
        if branch.finish_reason is None:
            return stream.push(tokens, held)
        stop = branch.stop
        shown = tokens[:-1] if stop is not None and not stop.counted else tokens
        return stream.finish(shown, stop.trim_text if stop is not None else 0)
