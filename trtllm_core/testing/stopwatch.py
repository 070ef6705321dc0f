"""How long a plugin takes: every method that the loop calls, on rows as they come in a session."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from trtllm_core.decoding.host import HostCriterionAdapter, HostProcessorAdapter, HostRow
from trtllm_core.testing.criteria import CriterionRig
from trtllm_core.testing.lives import Branch, Rig, Setting
from trtllm_core.testing.processors import ProcessorRig
from trtllm_core.testing.samplers import SamplerRig
from trtllm_core.testing.subject import Case

WARM_UP = 3
"""Steps that are not counted."""


@dataclass(frozen=True)
class Cost:
    """What one method of a plugin takes."""

    method: str
    """As the plugin's author calls it: ``mask``, ``apply``, ``check``, ``commit``, …"""
    rows: int
    """Of each call."""
    times: list[float] = field(repr=False)
    """Seconds of each call."""

    @property
    def mean(self) -> float:
        """Seconds of a call."""
        return statistics.fmean(self.times)

    @property
    def per_row(self) -> float:
        """Seconds of a row."""
        return self.mean / self.rows

    def record(self) -> dict[str, Any]:
        """For JSON; times are in seconds."""
        return {"method": self.method, "rows": self.rows, "step": self.mean, "row": self.per_row, "p95": self.p95}

    @property
    def p95(self) -> float:
        """Seconds that 95 of 100 calls stay below."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


class _Narrow(SamplerRig):
    probes: ClassVar[int] = 1


class Workbench:
    """A batch of slots that generate, with a stopwatch around the plugin. What it makes end begins again.

    Args:
        setting: the plugin, the vocabulary, and as many slots as the batch has rows.
        case: what all of them ask for.
        prompt: tokens of each prompt.
    """

    RIGS: ClassVar[dict[str, type[Rig[Any]]]] = {
        "logits_processor": ProcessorRig,
        "stopping_criterion": CriterionRig,
        "decoder": _Narrow,
    }

    def __init__(self, setting: Setting, case: Case, prompt: int) -> None:
        self.setting = setting
        self.random = random.Random(0)
        self.rig = self.RIGS[setting.subject.kind.name](setting)
        self.times: dict[str, list[float]] = {}
        self.rig.watch = self._watch
        for slot in range(setting.slots):
            tokens = tuple(self.random.randrange(setting.vocab_size) for _ in range(prompt))
            self.rig.begin(slot, Branch(case, tokens, seed=slot))

    def run(self, steps: int) -> list[Cost]:
        """Generate, and say what each method took."""
        begun = self.times.pop("begin")
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                self.times.clear()
            self._step()
        self.times.setdefault("begin", []).extend(begun)
        rows = {"begin": 1, "pending_text": 1}
        names = {"prepare": "mask", "check_rows": "check"}
        return [Cost(names.get(name, name), rows.get(name, self.setting.slots), t) for name, t in self.times.items()]

    def _step(self) -> None:
        slots = list(self.rig.branches)
        new = dict(zip(slots, self._chosen(slots), strict=True))
        stops = self.rig.stops(new) if not isinstance(self.rig, CriterionRig) else self._check(new)
        self.rig.commit(new)
        for slot in slots:
            branch = self.rig.branches[slot]
            full = len(branch.text) >= self.setting.max_seq_len - 1
            if slot in stops or full:
                self.rig.end(slot)
                self.rig.begin(slot, branch)

    def _chosen(self, slots: list[int]) -> list[list[int]]:
        """A next token for each slot: what processed logits give, or a random one."""
        if isinstance(self.rig, ProcessorRig):
            acting = self.rig.acting
            if isinstance(acting, HostProcessorAdapter) and acting.masks:
                self.rig.call(acting.prepare, [HostRow(slot) for slot in slots])
            logits = self.rig.processed(slots, self._logits(len(slots)))
            return [[token] for token in logits[:, : self.setting.vocab_size].argmax(1).tolist()]
        if isinstance(self.rig, SamplerRig):
            return [[token] for token in self.rig.taken(slots, self._logits(len(slots)))]
        return [[self.random.randrange(self.setting.vocab_size)] for _ in slots]

    def _logits(self, rows: int) -> torch.Tensor:
        context = self.rig.floor.context
        logits = torch.randn(rows, context.vocab_size_padded, device=context.device).mul_(3)
        logits[:, context.vocab_size :] = torch.finfo(torch.float32).min
        return logits

    def _check(self, new: dict[int, list[int]]) -> dict[int, int]:
        assert isinstance(self.rig, CriterionRig)
        stops = {slot: 1 for slot, stop in self.rig.said(new).items() if stop is not None}
        if isinstance(self.rig.acting, HostCriterionAdapter):
            for slot in new:
                self.rig.call(self.rig.acting.pending_text, slot)
        return stops

    @contextmanager
    def _watch(self, method: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.times.setdefault(method, []).append(time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.setting.device != "cpu":
            torch.cuda.synchronize(self.setting.device)
