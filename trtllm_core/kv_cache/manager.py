"""The classic ``KVCacheManager``: its signatures and results, on top of a KV allocation policy."""

from __future__ import annotations

import torch

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache.classic_blocks import block_offsets
from trtllm_core.kv_cache.options import PagedOptions
from trtllm_core.kv_cache.paged import PagedPolicy
from trtllm_core.plugin.kv_policy import Edits, KVBudget, KVModel, KVPolicy

_ENDLESS = 2**31 - 1
"""A length that is never reached: the classic manager knows no maximum, its caches are rings."""


class GenerationSequence:
    """One sequence: a name that stays (``seq_idx``), and a place in the batch that moves as others finish."""

    def __init__(self, seq_idx: int, batch_idx: int) -> None:
        self.seq_idx = seq_idx
        self.batch_idx = batch_idx

    def get_batch_idx(self) -> int:
        """Place in the batch."""
        return self.batch_idx

    def get_seq_idx(self) -> int:
        """Name of the sequence."""
        return self.seq_idx

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationSequence):
            return NotImplemented
        return (self.seq_idx, self.batch_idx) == (other.seq_idx, other.batch_idx)

    def __hash__(self) -> int:
        return hash(self.seq_idx)

    def __repr__(self) -> str:
        return f"GenerationSequence(seq_idx={self.seq_idx}, batch_idx={self.batch_idx})"


class KVCacheManager:
    """Block tables of a static batch with beams. Lengths are in tokens, ``block_size`` in elements.

    Sinks are padded to whole blocks with ``bubble_len`` unused entries, which count as tokens here; the cache holds
    ``max_token_num`` entries of a sequence, after which it is a ring that leaves the first ``sink_block_token_num``
    alone. Full context blocks are shared by the beams; the last one is each beam's own if it is not full.

    Against the classic class: a last block of a single token is each beam's own, too, and a full one is shared; a
    call that fails changes nothing; :meth:`take_edits` says which blocks must be copied, so that each beam's table is
    complete in itself (kernels that read the context through beam 0, as the classic ones did, need not copy it).

    ``policy`` may be any KV allocation policy whose ring, if it has one, has the classic entries; None is ``paged``.

    Raises:
        ConfigError: sizes below one, sinks that fill the window, or a policy with another ring.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        tokens_per_block: int,
        max_blocks_per_seq: int,
        max_attention_window_size: int,
        sink_token_len: int,
        beam_width: int = 1,
        use_one_more_block: bool = False,
        policy: KVPolicy | None = None,
    ) -> None:
        sizes = (num_layers, num_blocks, block_size, tokens_per_block, max_blocks_per_seq, beam_width)
        if min(sizes) < 1 or not 0 <= sink_token_len < max_attention_window_size:
            raise ConfigError(
                "KVCacheManager: all sizes must be >= 1, and sink_token_len "
                f"({sink_token_len}) below max_attention_window_size ({max_attention_window_size})"
            )
        self.num_layers = num_layers
        self.block_size = block_size
        self.tokens_per_block = tokens_per_block
        self.max_blocks_per_seq = max_blocks_per_seq
        self.beam_width = beam_width
        self.bubble_len = -sink_token_len % tokens_per_block
        self.sink_block_token_num = sink_token_len + self.bubble_len
        self.max_token_num = max_attention_window_size + self.bubble_len
        if use_one_more_block:
            self.max_token_num += tokens_per_block
        self.sequences: list[GenerationSequence] = []
        """By place in the batch."""
        self.lens: list[int] = []
        """Length of each sequence, bubble and the token of the coming step included."""
        # Where a table or the pool is too short for the ring, its end is the limit, and nothing is overwritten.
        most = min(max_blocks_per_seq, num_blocks) * tokens_per_block
        fits = self.max_token_num <= most
        window, sink = (self.max_token_num, self.sink_block_token_num) if fits else (None, 0)
        self.policy = policy or PagedPolicy(PagedOptions(max_attention_window=window, sink_token_length=sink))
        slots = num_blocks * beam_width
        longest = _ENDLESS if fits else most
        self.plan = self.policy.plan(
            KVModel(num_layers, 1, 1, "", 0), KVBudget(slots, longest, tokens_per_block, num_blocks * tokens_per_block)
        )
        if (self.plan.window, self.plan.sink) != (window, sink):
            raise ConfigError(
                f"KVCacheManager: the policy's ring (window {self.plan.window}, sink {self.plan.sink}) must be that of "
                f"the arguments (window {window}, sink {sink})"
            )
        if self.plan.host_blocks:
            raise ConfigError(
                "KVCacheManager tells of copies alone: a policy that saves blocks to the host cannot be used"
            )
        self._slots: list[range] = []
        self._free = list(range(num_blocks - 1, -1, -1))
        self._edits = self._after_context = Edits()

    def add_sequence(
        self, sequence: GenerationSequence, context_len: int, always_share_across_beam: bool = False
    ) -> None:
        """Blocks for a sequence of ``context_len`` tokens, as the next one of the batch.

        ``always_share_across_beam`` shares all of them, for caches that are only read (cross-attention).

        Raises:
            ConfigError: ``sequence.batch_idx`` is not the next place in the batch, or the context is empty.
            CapacityError: (a ``RuntimeError``) there are too few blocks.
        """
        if sequence.get_batch_idx() != len(self.sequences) or context_len < 1:
            raise ConfigError(
                f"{sequence} with context_len {context_len}: batch_idx must be {len(self.sequences)}, context_len >= 1"
            )
        if not self._free:
            raise CapacityError("Can't allocate new block for KV cache: each block belongs to another sequence")
        length = context_len + self.bubble_len
        slots = range(self._free[-1] * self.beam_width, (self._free[-1] + 1) * self.beam_width)
        first, others = slots[0], slots[1:]
        edits = Edits()
        held: list[int] = []
        try:
            if self.policy.admit(first, range(length), 0) is None:
                raise CapacityError(f"only {self.policy.usage().free} blocks are free")
            held.append(first)
            edits += self.policy.extend([first], [length]).edits
            self.policy.commit([first], [length])
            edits += self.policy.fork([first] * len(others), others)
            held += others
            if length % self.tokens_per_block and not always_share_across_beam:
                # Beam 0 comes last, and so keeps the block that the context is written to.
                edits += self.policy.extend([*others, first], [1] * len(slots)).edits
        except CapacityError as error:
            self.policy.release(held)
            raise CapacityError(f"Can't allocate new block for KV cache for {sequence}: {error}") from error
        self._free.pop()
        self._slots.append(slots)
        self.sequences.append(sequence)
        self.lens.append(length)
        self._after_context += edits

    def step(self, finished: list[bool]) -> None:
        """Room for one more token of each sequence that is not ``finished``; those that are give their blocks back.

        The sequences that stay move up in the batch (their ``batch_idx`` is changed). Blocks of finished sequences
        are there for the next call, not for this one.

        Raises:
            ConfigError: ``finished`` is not as long as the batch.
            CapacityError: (a ``RuntimeError``) there are too few blocks. Nothing was changed.
        """
        if len(finished) != len(self.sequences):
            raise ConfigError(f"finished has {len(finished)} entries, the batch {len(self.sequences)} sequences")
        stay = [place for place, over in enumerate(finished) if not over]
        live = [slot for place in stay for slot in self._slots[place]]
        try:
            edits = self.policy.extend(live, [1] * len(live)).edits
        except CapacityError as error:
            raise CapacityError(f"Can't allocate new block for KV cache: {error}") from error
        self.policy.commit(live, [1] * len(live))
        for place, over in enumerate(finished):
            if over:
                self.policy.release(self._slots[place])
                self._free.append(self._slots[place][0] // self.beam_width)
        self.sequences = [self.sequences[place] for place in stay]
        self.lens = [self.lens[place] + 1 for place in stay]
        self._slots = [self._slots[place] for place in stay]
        for place, sequence in enumerate(self.sequences):
            sequence.batch_idx = place
        self._edits = self._edits + self._after_context + edits
        self._after_context = Edits()

    def take_edits(self) -> Edits:
        """Copies to make before the next generation step; call it after :meth:`step`. Each is returned once.

        Copies of context blocks are only returned after the ``step`` that follows ``add_sequence``: before it, the
        context is not in the cache yet.
        """
        edits, self._edits = self._edits, Edits()
        return edits

    def get_block_offsets(self, beam_width: int) -> torch.Tensor:
        """int32 ``[batch, beam_width, 2, max_blocks_per_seq]``: ``block * num_layers * 2 + field``, 0 for no block.

        Field 0 is keys, 1 values; a kernel adds ``layer * 2``. ``beam_width`` may be 1 for the context step.
        """
        if not 1 <= beam_width <= self.beam_width:
            raise ConfigError(f"beam_width must be 1 to {self.beam_width}, got {beam_width}")
        slots = [slot for beams in self._slots for slot in beams[:beam_width]]
        wide = torch.from_numpy(self.policy.tables(slots))
        tables = wide.reshape(len(self.sequences), beam_width, wide.shape[1])[..., : self.max_blocks_per_seq]
        offsets = torch.zeros(len(self.sequences), beam_width, 2, self.max_blocks_per_seq, dtype=torch.int32)
        offsets[..., : tables.shape[2]] = block_offsets(tables, self.num_layers) * (tables >= 0).unsqueeze(2)
        return offsets

    def has_free_block(self) -> bool:
        """Whether there is a block that nobody owns."""
        return self.policy.usage().free > 0
