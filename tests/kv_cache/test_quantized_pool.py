"""The kit of KV policies over a pool of codes: what slots read back is to the bit what was written for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.plugin.kv_policy import Edits, KVModel
from trtllm_core.testing import KVPolicyConformance, kv_lives, kv_policy, run_kit
from trtllm_core.testing.papercache import LAYERS, PaperCache

HEADS, SIZE = 2, 6
CHECKS = [
    "test_slots_read_back_their_text",
    "test_forks_are_simultaneous",
    "test_forks_are_independent",
    "test_rewinds",
    "test_what_is_found_was_computed",
]
"""Those that look at what a cache holds."""


class CodedCache(PaperCache):
    """Beside the paper, a pool: whatever is written, copied or moved on paper is so in the pool. An entry holds numbers
    that only its text has."""

    kind = "int8"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        plan = self.plan
        model = KVModel(LAYERS, HEADS, SIZE, self.kind, 0)
        self.pool = KVPool(
            replace(plan, model=model),
            torch.float32,
            torch.device("cpu"),
        )
        self.paper = self.cache.copy()
        """What the pool should hold."""
        self.compared = 0

    def _run(self) -> None:
        self._sync()
        self.pool.edit(self._pending)
        super()._run()
        self.paper = self.cache.copy()

    def _settle(self, written: Any) -> None:
        self._sync()
        super()._settle(written)

    def _rearrange(self, slot: int, edits: Edits, before: np.ndarray) -> None:
        super()._rearrange(slot, edits, before)
        after = self.policy.tables([slot])[0]
        if edits.moves:
            source, target = (
                np.concatenate([self._entries(table, np.array([entry])) for entry in entries])
                for table, entries in (
                    (before, [move.source for move in edits.moves]),
                    (after, [move.target for move in edits.moves]),
                )
            )
            layer = np.array([-1 if move.layer is None else move.layer for move in edits.moves])
            self.pool.move(*(torch.from_numpy(part) for part in (source, target, layer)))
            paper, held = self.paper.reshape(LAYERS, -1), self.paper.reshape(LAYERS, -1).copy()
            for a, b, of in zip(source, target, layer, strict=True):
                layers = slice(None) if of < 0 else of
                paper[layers, b] = held[layers, a]

    def check(self) -> None:
        self._sync()
        super().check()
        held = self.paper.reshape(LAYERS, -1)
        for layer in range(LAYERS):
            found = self.pool.layers[layer].blocks(torch.arange(self.plan.num_blocks))
            written = torch.from_numpy(np.flatnonzero(held[layer] >= 0))
            names = torch.from_numpy(held[layer])[written]
            expected = (
                KVPool(self.pool.plan, torch.float32, torch.device("cpu")).layers[0].write(written, values(names))
            )
            assert torch.equal(found[written], expected)
            self.compared += len(written)

    def _sync(self) -> None:
        """What differs was written."""
        paper, now = self.paper.reshape(LAYERS, -1), self._flat
        for layer in range(LAYERS):
            entries = np.flatnonzero(paper[layer] != now[layer])
            if len(entries):
                names = torch.from_numpy(now[layer, entries])
                self.pool.layers[layer].write(torch.from_numpy(entries), values(names))
        paper[:] = now


def values(names: torch.Tensor) -> torch.Tensor:
    """Keys and values of each text, of sizes of its own."""
    angle = names[:, None].double() * torch.arange(1, 2 * HEADS * SIZE + 1)
    return ((1 + names % 7)[:, None] * angle.sin()).float().view(-1, 2 * HEADS, SIZE)


@pytest.mark.parametrize(
    ("name", "kind", "params"),
    [
        ("paged", "int8", ({}, {"max_attention_window": 10, "sink_token_length": 3})),
        ("prefix", "fp8", ({}, {"partial_blocks": False}, {"host_tokens": 24})),
        ("h2o", "int8", ({"heavy": 2, "recent": 3},)),
        ("streaming_llm", "fp8", ({"max_attention_window": 10, "sink_token_length": 3},)),
    ],
)
def test_slots_read_back_what_was_written(
    name: str, kind: str, params: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CodedCache] = []

    def make(*arguments: Any) -> CodedCache:
        made.append(CodedCache(*arguments))
        return made[-1]

    monkeypatch.setattr(CodedCache, "kind", kind)
    for module in (kv_lives, kv_policy):
        monkeypatch.setattr(module, "PaperCache", make)
    kit = type("Kit", (KVPolicyConformance,), {"plugin": name, "params": params, "lives": 4})
    assert {result.check: result.why for result in run_kit(kit, CHECKS) if result.status == "failed"} == {}
    assert sum(cache.compared for cache in made) > 1000


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVPool, "edit", lambda self, edits: None)
    monkeypatch.setattr(kv_lives, "PaperCache", CodedCache)
    kit = type("Kit", (KVPolicyConformance,), {"plugin": "paged"})
    (result,) = run_kit(kit, ["test_slots_read_back_their_text"])
    assert result.status == "failed"
