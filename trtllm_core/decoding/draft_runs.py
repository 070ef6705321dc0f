"""Running a draft engine beside the large one: its own cache, which follows the same text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trtllm_core.errors import ConfigError
from trtllm_core.kv_cache.cache import KVCache
from trtllm_core.kv_cache.contiguous import ContiguousPolicy
from trtllm_core.kv_cache.options import PagedOptions
from trtllm_core.kv_cache.paged import PagedPolicy
from trtllm_core.padding import PaddedRuns
from trtllm_core.plugin import DecodingContext, KVBudget
from trtllm_core.session import Session


class DraftRuns:
    """Steps of a draft engine, for the slots of the large one."""

    def __init__(self, session: Session, context: DecodingContext) -> None:
        """Raises:
        ConfigError: the engine has another vocabulary, or is too small to follow.
        """
        build, vocab = session.config.build, session.config.model.vocab_size
        if vocab != context.vocab_size:
            raise ConfigError(f"draft_model: the draft engine has {vocab} tokens, the large one {context.vocab_size}")
        if build.max_branches < context.slots or build.max_seq_len < context.max_seq_len:
            raise ConfigError(
                f"draft_model: the draft engine was built for {build.max_branches} sequences of {build.max_seq_len} "
                f"tokens, the large one for {context.slots} of {context.max_seq_len}: build it for as many"
            )
        self.session = session
        self._context = context
        packed = session.config.contract == "packed_paged"
        self._engine: Session | PaddedRuns = session if packed else PaddedRuns(session)
        size = build.tokens_per_block if packed else build.max_seq_len
        blocks = build.max_branches * -(-build.max_seq_len // size)
        # No ring, whatever the draft model's layers see: what was guessed must leave the cache again.
        policy = PagedPolicy(PagedOptions(follow_sliding_window=False)) if packed else ContiguousPolicy()
        budget = KVBudget(build.max_branches, build.max_seq_len, size, blocks * size)
        self._cache = KVCache(policy, session.engine, budget)
        self._most = build.max_num_tokens

    def begin(self, slot: int, prompt: Sequence[int], longest: int) -> None:
        """A branch starts, which may become ``longest`` tokens."""
        self._cache.admit(slot, prompt, max(longest - len(prompt), 1))

    def end(self, slot: int) -> None:
        """The branch is over."""
        self._cache.release(np.array([slot]))

    def keep(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """The slots' texts have ``lengths`` tokens now: what was guessed beyond them leaves the cache."""
        slot = np.array(slots)
        over = self._cache.cached[slot] - np.array(lengths) + 1
        if (over > 0).any():
            self._cache.rewind(slot[over > 0], over[over > 0])

    def catch_up(self, slots: Sequence[int]) -> torch.Tensor:
        """Run all that the draft engine has not seen; logits behind the last token, ``[n, vocab_size_padded]``."""
        index = torch.tensor(slots, device=self._context.device)
        texts, lengths = self._context.tokens[index].cpu().numpy(), self._context.lengths[index].tolist()
        logits = None
        while True:
            past = self._cache.cached[np.array(slots)]
            left, rows, ids = self._most, [], []
            for row, (length, seen) in enumerate(zip(lengths, past.tolist(), strict=True)):
                count = min(length - seen, left)
                if count > 0:
                    rows.append(row)
                    ids.append(texts[row, seen : seen + count])
                    left -= count
            if not rows:
                assert logits is not None
                return logits
            out = self._run([slots[row] for row in rows], ids)
            if logits is None:
                logits = out.new_empty(len(slots), out.shape[1])
            logits[torch.tensor(rows, device=out.device)] = out

    def step(self, slots: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Run one more token of each slot (int64 ``[n]``); the logits behind it."""
        return self._run(slots, [np.array([token], np.int32) for token in tokens.tolist()])

    def _run(self, slots: Sequence[int], ids: Sequence[np.ndarray]) -> torch.Tensor:
        slot, counts = np.array(slots), np.array([len(row) for row in ids])
        self._cache.extend(slot, counts)
        past, ends = self._cache.cached[slot], np.cumsum(counts)
        position = np.arange(ends[-1]) - np.repeat(ends - counts - past, counts)
        arrays = {
            "input_ids": np.concatenate(ids).astype(np.int32),
            "position_ids": position.astype(np.int64),
            "query_lengths": counts.astype(np.int32),
            "past_lengths": past.astype(np.int32),
            "block_tables": self._cache.tables[slot],
            "logits_indices": ends - 1,
        }
        config = self.session.config
        logits = torch.empty(len(slots), config.vocab_size_padded, device=self.session.device)
        self._engine.run({name: torch.from_numpy(array) for name, array in arrays.items()}, {"logits": logits})
        logits[:, config.model.vocab_size :] = torch.finfo(torch.float32).min
        self._cache.commit(slot, counts)
        return logits.to(self._context.device)
