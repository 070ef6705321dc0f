"""The KV cache as the loop sees it: a policy's decisions, kept as arrays that are read without calling it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trtllm_core.errors import CapacityError, ConfigError, PluginContractError
from trtllm_core.kv_cache.offered import check_offered, model_of, settles
from trtllm_core.plugin.backend import Executable
from trtllm_core.plugin.kv_policy import (
    Admission,
    Edits,
    KVBudget,
    KVPlan,
    KVPolicy,
    KVStatistics,
    KVUsage,
)


class KVCache:
    """Room for the tokens of every slot.

    The policy is called when a slot's room is used up, about once a block, and not once a token: what was written in
    between is reported to it first. All arrays are indexed by slot.

    ``history``, int32 ``[slots, max_seq_len]``, holds the tokens of each slot, for policies that need them.
    """

    def __init__(
        self, policy: KVPolicy, executable: Executable, budget: KVBudget, history: np.ndarray | None = None
    ) -> None:
        self.policy = policy
        plan = policy.plan(model_of(executable), budget)
        self.plan: KVPlan = replace(plan, scores="attention_scores" in policy.needs)
        check_offered(policy, self.plan, executable)
        self.bytes = executable.allocate_kv(self.plan)
        self._executable = executable
        self._longest = budget.max_seq_len
        self.tables = np.full((budget.max_slots, self.plan.max_blocks_per_slot), -1, np.int32)
        self.cached = np.zeros(budget.max_slots, np.int64)
        """Tokens that were written to the cache, overwritten and dropped ones included."""
        self.dropped = np.zeros(budget.max_slots, np.int64)
        """Of these, tokens that the policy has dropped."""
        self._reported = np.zeros(budget.max_slots, np.int64)
        self._room = np.zeros(budget.max_slots, np.int64)
        self._prompts = np.zeros(budget.max_slots, np.int64)
        self._held = np.zeros(budget.max_slots, np.bool_)
        self.settles = settles(policy)
        """Whether the policy has its say after each step."""
        self._history = history if "tokens" in policy.needs else None

    def check(
        self,
        prompt: int,
        max_new_tokens: int,
        priority: int | None = None,
        branches: int = 1,
        companions: Sequence[int] = (),
    ) -> None:
        """Refuse a request that the pool could not hold even alone, long before its turn comes.

        Each of its ``branches`` is admitted as if it were alone, and so are the companions of each, which have
        prompts of ``companions`` tokens.

        Raises:
            CapacityError: it needs more blocks than a slot can ever have. Only the policy's ``admit`` knows the rest.
            ConfigError: it has a priority, which the policy does not look at.
        """
        if priority is not None and not self.policy.honours_priority:
            raise ConfigError(
                f"cache_priority={priority}: KV policy {type(self.policy).__name__} does not look at priorities; "
                "choose KVCacheConfig(policy='prefix', options={'eviction': 'priority'})"
            )
        plan = self.plan
        room = min(plan.num_blocks, plan.max_blocks_per_slot) * plan.tokens_per_block
        bounded = plan.window is None and not plan.evicts  # others take any number of tokens
        longest = max((prompt, *companions))
        if bounded and longest + max_new_tokens > room:
            raise CapacityError(
                f"{longest} prompt tokens and max_new_tokens {max_new_tokens} need {longest + max_new_tokens} tokens "
                f"of cache, but the pool has {room} for one sequence: raise KVCacheConfig.max_tokens, or ask for "
                "fewer tokens"
            )
        blocks = sum(
            -(-min(each + max_new_tokens, plan.window or room) // plan.tokens_per_block)
            for each in (prompt, *companions)
        )
        if branches * blocks > plan.num_blocks:
            beside = f", with {len(companions)} companions each," if companions else ""
            raise CapacityError(
                f"{branches} branches of {prompt} prompt tokens and max_new_tokens {max_new_tokens}{beside} need "
                f"{branches * blocks} blocks of cache, but the pool has {plan.num_blocks}: raise "
                "KVCacheConfig.max_tokens, or ask for fewer branches or tokens"
            )

    def check_window(self, window: int | None, sink: int | None) -> None:
        """Refuse a request that asks for another window than this cache has.

        Raises:
            ConfigError: it does.
        """
        plan = self.plan
        hides = plan.window is not None and not plan.rewindable  # others overwrite what no layer sees any more
        have = (plan.window, plan.sink) if hides else (None, 0)
        asked = (None, 0) if window is None or window >= self._longest else (window, sink or 0)
        if (window is not None or sink) and asked != have:
            raise ConfigError(
                f"max_attention_window_size={window} and sink_token_length={sink}: the KV cache of this session has "
                f"window {have[0]} and {have[1]} sinks; set them for the session, in KVCacheConfig.options"
            )

    def admit(
        self,
        slot: int,
        tokens: Sequence[int],
        max_new_tokens: int,
        extra_key: tuple[Any, ...] = (),
        priority: int | None = None,
    ) -> Admission | None:
        """As ``KVPolicy.admit``; a hit counts as cached.

        Raises:
            PluginContractError: the policy calls the whole prompt a hit, and so leaves nothing to compute logits from.
        """
        if self._history is not None:  # what was written is there for reuse at once
            self._report(np.flatnonzero(self.cached > self._reported))
        keywords = {} if priority is None else {"priority": priority}
        admission = self.policy.admit(slot, tokens, max_new_tokens, extra_key, **keywords)
        if admission is not None:
            if not 0 <= admission.hit_length <= max(len(tokens) - 1, 0):
                raise PluginContractError(
                    f"KV policy {type(self.policy).__name__} says that {admission.hit_length} of {len(tokens)} prompt "
                    "tokens are cached: at least one must be computed"
                )
            self._held[slot] = True
            self._prompts[slot] = len(tokens)
            self._edit(admission.edits)
            self.cached[slot] = self._reported[slot] = self._room[slot] = admission.hit_length
        return admission

    def extend(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """Make room for ``counts`` more tokens of ``slots``; nothing happens while there is room.

        Raises:
            OutOfBlocksError: there is none, and nothing was changed.
            PluginContractError: the policy moves or drops entries, which only follows a step.
        """
        short = self.cached[slots] + counts > self._room[slots]
        if not short.any():
            return
        slots, counts = slots[short], counts[short]
        self._report(slots)
        placement = self.policy.extend(slots.tolist(), counts.tolist())
        self._edit(placement.edits)
        self.tables[slots] = placement.tables
        self._room[slots] = self._reported[slots] + placement.room

    def commit(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """``counts`` tokens of ``slots`` were written."""
        self.cached[slots] += counts

    def settle(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """A step has written ``counts`` tokens of ``slots``, in the order of its rows: the policy may move and drop.

        Raises:
            PluginContractError: what it moves or drops is not there.
        """
        if not self.settles:
            return
        self._report(slots)
        scores = self._executable.attention_scores() if self.plan.scores else None
        ended = self.cached[slots]
        prompts = (ended - counts < self._prompts[slots]) & (ended >= self._prompts[slots])
        for verb, mask in ((self.policy.after_prefill, prompts), (self.policy.after_step, ~prompts)):
            rows = np.flatnonzero(mask).tolist()
            if rows:
                seen = None if scores is None else KVStatistics([scores[row] for row in rows])
                edits = verb(slots[rows].tolist(), seen)
                if edits:
                    self._rearrange(edits)

    def rewind(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """The last ``counts`` cached tokens of ``slots`` are taken back."""
        # Of what the policy has not heard of yet, it need not hear: drafts come and go within a slot's room. A ring is
        # told, because what overwrote another token cannot be taken back.
        late = np.minimum(counts, self.cached[slots] - self._reported[slots]) if self.plan.window is None else 0
        self.cached[slots] -= late
        told = counts > late
        slots, counts = slots[told], (counts - late)[told]
        if len(slots):
            self._report(slots)
            self.policy.rewind(slots.tolist(), counts.tolist())
            self.cached[slots] -= counts
            self._reset(slots)

    def fork(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Slots ``dst`` become copies of slots ``src``, all at the same time."""
        self._report(np.unique(src))  # a source of several copies is named once
        edits = self.policy.fork(src.tolist(), dst.tolist())
        self._edit(edits)
        self._held[dst] = True
        for values in (self.cached, self.dropped, self._prompts):
            values[dst] = values[src]  # the right side is a copy before the left is written
        self._reset(np.union1d(src, dst))

    def release(self, slots: np.ndarray, keep: bool = False) -> None:
        """The slots are over; their blocks are free at once, or with ``keep`` may stay for reuse by other requests.

        Slots that hold nothing, because they were released before, are passed over.
        """
        slots = slots[self._held[slots]]
        if keep:
            self._report(slots)
        self.policy.release(slots.tolist(), keep)
        self._held[slots] = False
        self.cached[slots] = self.dropped[slots] = self._reported[slots] = self._room[slots] = 0
        self.tables[slots] = -1

    def usage(self) -> KVUsage:
        """How full the pool is."""
        return self.policy.usage()

    def _edit(self, edits: Edits) -> None:
        if edits.moves or edits.drops:
            raise PluginContractError(
                f"KV policy {type(self.policy).__name__} moves or drops entries where nothing was computed: only "
                "after_prefill and after_step may"
            )
        if edits:
            self._executable.edit_kv(edits)

    def _rearrange(self, edits: Edits) -> None:
        """Run what ``after_prefill`` or ``after_step`` returned."""
        blocks = replace(edits, moves=(), drops=())
        if blocks:
            self._executable.edit_kv(blocks)
        moves = np.array([(m.slot, m.source, m.target, -1 if m.layer is None else m.layer) for m in edits.moves], int)
        slot, source, target, layer = moves.reshape(-1, 4).T
        there = self.cached - self.dropped
        if (np.minimum(source, target) < 0).any() or (np.maximum(source, target) >= there[slot]).any():
            raise PluginContractError(self._broken("moves entries that are not there"))
        dropped = np.array(edits.drops, int).reshape(-1, 2)
        touched = np.unique(np.concatenate((slot, dropped[:, 0])))
        tables = self.tables.copy()
        tables[touched] = self.policy.tables(touched.tolist())
        if len(moves):
            places = _places(self.plan, self.tables, slot, source), _places(self.plan, tables, slot, target)
            self._executable.move_kv(*places, layer)
        for one, count in dropped.tolist():
            self.dropped[one] += count
            if count < 0 or self.policy.length(one) != self.cached[one] - self.dropped[one]:
                raise PluginContractError(
                    self._broken(f"drops {count} entries, but has {self.policy.length(one)} left")
                )
        self._reset(touched)

    def _broken(self, what: str) -> str:
        return f"KV policy {type(self.policy).__name__} {what}"

    def _report(self, slots: np.ndarray) -> None:
        start, end = self._reported[slots], self.cached[slots]
        if (start == end).all():
            return
        counts = (end - start).tolist()
        if self._history is None:
            self.policy.commit(slots.tolist(), counts)
        else:
            rows = zip(slots.tolist(), start.tolist(), end.tolist(), strict=True)
            tokens = [self._history[slot, first:last].tolist() for slot, first, last in rows]
            self.policy.commit(slots.tolist(), counts, tokens)
        self._reported[slots] = end

    def _reset(self, slots: np.ndarray) -> None:
        """After blocks changed hands: read the tables again and ask for room before the next write."""
        self.tables[slots] = self.policy.tables(slots.tolist())
        self._reported[slots] = self._room[slots] = self.cached[slots]


def _places(plan: KVPlan, tables: np.ndarray, slot: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """int64: entries of the pool."""
    block = tables[slot, entry // plan.tokens_per_block].astype(np.int64)
    return block * plan.tokens_per_block + entry % plan.tokens_per_block  # type: ignore[no-any-return]
