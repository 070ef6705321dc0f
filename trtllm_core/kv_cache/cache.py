"""The KV cache as the loop sees it: a policy's decisions, kept as arrays that are read without calling it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_core.errors import CapacityError, ConfigError, PluginContractError
from trtllm_core.plugin.backend import Executable
from trtllm_core.plugin.kv_policy import Admission, Edits, KVBudget, KVModel, KVPlan, KVPolicy, KVUsage


class KVCache:
    """Room for the tokens of every slot.

    The policy is called when a slot's room is used up, about once a block, and not once a token: what was written in
    between is reported to it first. All arrays are indexed by slot.

    ``history``, int32 ``[slots, max_seq_len]``, holds the tokens of each slot, for policies that need them.
    """

    def __init__(
        self, policy: KVPolicy, executable: Executable, budget: KVBudget, history: np.ndarray | None = None
    ) -> None:
        config = executable.config
        size = config.build.tp_size
        model = KVModel(
            num_layers=config.model.num_layers,
            num_kv_heads=max(config.model.num_kv_heads // size, 1),
            head_size=config.model.head_size,
            dtype=config.kv_dtype,
            bytes_per_token=config.model.kv_bytes_per_token(config.kv_dtype, size),
            sliding_window=config.model.sliding_window,
        )
        self.policy = policy
        self.plan: KVPlan = policy.plan(model, budget)
        self.bytes = executable.allocate_kv(self.plan)
        self._executable = executable
        self.tables = np.full((budget.max_slots, self.plan.max_blocks_per_slot), -1, np.int32)
        self.cached = np.zeros(budget.max_slots, np.int64)
        """Tokens written to the cache."""
        self._reported = np.zeros(budget.max_slots, np.int64)
        self._room = np.zeros(budget.max_slots, np.int64)
        self._held = np.zeros(budget.max_slots, np.bool_)
        self._history = history if "tokens" in policy.needs else None

    def check(self, prompt: int, max_new_tokens: int, priority: int | None = None, branches: int = 1) -> None:
        """Refuse a request that the pool could not hold even alone, long before its turn comes.

        Each of its ``branches`` is admitted as if it were alone.

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
        if plan.window is None and prompt + max_new_tokens > room:  # a ring holds any number
            raise CapacityError(
                f"{prompt} prompt tokens and max_new_tokens {max_new_tokens} need {prompt + max_new_tokens} tokens of "
                f"cache, but the pool has {room} for one sequence: raise KVCacheConfig.max_tokens, or ask for "
                "fewer tokens"
            )
        blocks = -(-min(prompt + max_new_tokens, plan.window or prompt + max_new_tokens) // plan.tokens_per_block)
        if branches * blocks > plan.num_blocks:
            raise CapacityError(
                f"{branches} branches of {prompt} prompt tokens and max_new_tokens {max_new_tokens} need "
                f"{branches * blocks} blocks of cache, but the pool has {plan.num_blocks}: raise "
                "KVCacheConfig.max_tokens, or ask for fewer branches or tokens"
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
            self._edit(admission.edits)
            self.cached[slot] = self._reported[slot] = self._room[slot] = admission.hit_length
        return admission

    def extend(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """Make room for ``counts`` more tokens of ``slots``; nothing happens while there is room.

        Raises:
            OutOfBlocksError: there is none, and nothing was changed.
            PluginContractError: the policy asks for what this loop cannot do.
        """
        short = self.cached[slots] + counts > self._room[slots]
        if not short.any():
            return
        slots, counts = slots[short], counts[short]
        self._report(slots)
        placement = self.policy.extend(slots.tolist(), counts.tolist())
        if placement.positions is not None:
            raise PluginContractError(self._refusal("Placement.positions", "tokens keep their own numbers"))
        self._edit(placement.edits)
        self.tables[slots] = placement.tables
        self._room[slots] = self._reported[slots] + placement.room

    def commit(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """``counts`` tokens of ``slots`` were written."""
        self.cached[slots] += counts

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
        self.cached[dst] = self.cached[src]
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
        self.cached[slots] = self._reported[slots] = self._room[slots] = 0
        self.tables[slots] = -1

    def usage(self) -> KVUsage:
        """How full the pool is."""
        return self.policy.usage()

    def _edit(self, edits: Edits) -> None:
        if edits.moves:
            raise PluginContractError(self._refusal("Edits.moves", "entries stay where they were written"))
        if edits:
            self._executable.edit_kv(edits)

    def _refusal(self, what: str, instead: str) -> str:
        return f"KV policy {type(self.policy).__name__} returned {what}, which this session does not honour: {instead}"

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
