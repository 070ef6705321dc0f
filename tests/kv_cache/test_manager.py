"""The classic manager: its worked examples, the bugs that it no longer has, and what its beams read back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.kv_cache import (
    Block,
    BlocksManager,
    ContiguousPolicy,
    GenerationSequence,
    KVCacheManager,
    PagedOptions,
    PagedPolicy,
)
from trtllm_core.plugin.kv_policy import Edits

LAYERS = 3


def manager(
    beams: int = 1, blocks: int = 16, tpb: int = 64, window: int = 512, sink: int = 0, **rest: object
) -> KVCacheManager:
    return KVCacheManager(LAYERS, blocks, 2 * tpb * 8, tpb, 16, window, sink, beams, **rest)  # type: ignore[arg-type]


def blocks_of(kv: KVCacheManager, row: int = 0) -> list[list[int]]:
    """Block numbers of each beam of a row."""
    tables = kv.policy.tables(kv._slots[row])
    return [[block for block in beam if block >= 0] for beam in tables.tolist()]


def test_sequences() -> None:
    one = GenerationSequence(3, 1)
    assert (one.get_seq_idx(), one.get_batch_idx(), hash(one)) == (3, 1, hash(3))
    assert one == GenerationSequence(seq_idx=3, batch_idx=1)
    assert one != GenerationSequence(3, 2)
    assert one != 3


@pytest.mark.parametrize(
    ("context", "added", "stepped"),
    [
        (64, [[0], [0]], [[0, 1], [0, 2]]),  # classic: a full block was not shared, [0] and [1]
        (65, [[0, 1], [0, 2]], [[0, 1], [0, 2]]),  # classic: both beams wrote block 1
        (66, [[0, 1], [0, 2]], [[0, 1], [0, 2]]),
        (129, [[0, 1, 2], [0, 1, 3]], [[0, 1, 2], [0, 1, 3]]),
    ],
)
def test_beams_share_full_context_blocks_only(context: int, added: list[list[int]], stepped: list[list[int]]) -> None:
    kv = manager(beams=2)
    kv.add_sequence(GenerationSequence(0, 0), context)
    assert blocks_of(kv) == added
    kv.step([False])
    assert blocks_of(kv) == stepped
    assert kv.lens == [context + 1]


def test_always_share_across_beam() -> None:
    kv = manager(beams=2)
    kv.add_sequence(GenerationSequence(0, 0), 66, always_share_across_beam=True)
    assert blocks_of(kv) == [[0, 1], [0, 1]]


def test_context_blocks_are_copied_after_the_context_step() -> None:
    kv = manager(beams=3)
    kv.add_sequence(GenerationSequence(0, 0), 70)
    assert kv.take_edits() == Edits()
    kv.step([False])
    assert kv.take_edits() == Edits(copies=((1, 2), (1, 3)))
    assert kv.take_edits() == Edits()


def test_block_offsets() -> None:
    kv = manager(beams=2)
    assert kv.get_block_offsets(2).shape == (0, 2, 2, 16)
    kv.add_sequence(GenerationSequence(0, 0), 70)
    kv.add_sequence(GenerationSequence(1, 1), 3)
    offsets = kv.get_block_offsets(2)
    assert (offsets.dtype, offsets.shape) == (torch.int32, (2, 2, 2, 16))
    for row in range(2):
        for beam, blocks in enumerate(blocks_of(kv, row)):
            for field in range(2):
                expected = [block * LAYERS * 2 + field for block in blocks]
                assert offsets[row, beam, field].tolist() == expected + [0] * (16 - len(blocks))
    assert torch.equal(kv.get_block_offsets(1), offsets[:, :1])
    with pytest.raises(ConfigError, match="beam_width must be 1 to 2"):
        kv.get_block_offsets(3)


def test_step_frees_the_finished_and_moves_the_others_up() -> None:
    kv = manager()
    sequences = [GenerationSequence(seq, seq) for seq in range(3)]
    for sequence in sequences:
        kv.add_sequence(sequence, 64)
    kv.step([False, True, False])
    assert kv.sequences == [GenerationSequence(0, 0), GenerationSequence(2, 1)]
    assert sequences[2].get_batch_idx() == 1
    assert kv.lens == [65, 65]
    assert kv.policy.usage().free == 16 - 4
    kv.step([True, True])
    assert kv.get_block_offsets(1).shape[0] == 0
    assert kv.policy.usage().free == 16
    with pytest.raises(ConfigError, match=r"finished has 1 entries, the batch 0 sequences"):
        kv.step([False])


def test_failing_step_changes_nothing() -> None:
    kv = manager(beams=2, blocks=7)
    for seq in range(2):
        kv.add_sequence(GenerationSequence(seq, seq), 128)
    before = (blocks_of(kv, 0), blocks_of(kv, 1), list(kv.lens), kv.policy.usage())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Can't allocate new block for KV cache"):
            kv.step([False, False])
        assert (blocks_of(kv, 0), blocks_of(kv, 1), kv.lens, kv.policy.usage()) == before
    assert kv.take_edits() == Edits()


@pytest.mark.parametrize("context", [66, 129, 194], ids=["half-way", "not now", "never"])
def test_failing_add_changes_nothing(context: int) -> None:
    kv = manager(beams=2, blocks=3)
    kv.add_sequence(GenerationSequence(0, 0), 64)
    before = kv.policy.usage()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Can't allocate new block for KV cache"):
            kv.add_sequence(GenerationSequence(1, 1), context)
        assert (kv.policy.usage(), len(kv.sequences), kv.lens) == (before, 1, [64])
        kv.policy.check_integrity()
    kv.step([True])
    kv.add_sequence(GenerationSequence(1, 0), 66)
    assert not kv.has_free_block()


def test_a_table_that_is_shorter_than_the_ring_is_the_limit() -> None:
    kv = KVCacheManager(1, 8, 64, 4, 2, 100, 0)
    kv.add_sequence(GenerationSequence(0, 0), 7)
    kv.step([False])
    with pytest.raises(CapacityError, match="would hold 9 tokens, but a sequence can hold 8"):
        kv.step([False])
    assert kv.lens == [8]


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="sizes must be >= 1"):
        manager(blocks=0)
    with pytest.raises(ConfigError, match="below max_attention_window_size"):
        manager(window=4, sink=4)
    with pytest.raises(ConfigError, match="batch_idx must be 0"):
        manager().add_sequence(GenerationSequence(0, 1), 3)
    with pytest.raises(ConfigError, match=r"ring \(window None, sink 0\) must be"):
        manager(policy=PagedPolicy())


def test_another_policy() -> None:
    kv = manager(policy=PagedPolicy(PagedOptions(max_attention_window=512, watermark=0.5)))
    kv.add_sequence(GenerationSequence(0, 0), 64 * 8)
    with pytest.raises(CapacityError, match="only 8 blocks are free"):
        kv.add_sequence(GenerationSequence(1, 1), 1)
    fixed = KVCacheManager(1, 4, 64, 4, 1, 100, 0, policy=ContiguousPolicy())
    fixed.add_sequence(GenerationSequence(0, 0), 3)
    assert fixed.get_block_offsets(1)[0, 0].tolist() == [[0], [1]]


class Beams:
    """Reads and writes what the manager says. Beams never change places; each writes one token a step."""

    def __init__(self, kv: KVCacheManager, blocks: int) -> None:
        self.kv = kv
        self.cache = np.full((blocks, kv.tokens_per_block, 2), -1)
        self.texts: dict[int, list[list[int]]] = {}
        self.count = 0

    def entry(self, row: int, beam: int, position: int) -> tuple[int, int]:
        """Where token ``position`` (bubble included) is: by the formula of the classic kernel, not by the plan's."""
        kv = self.kv
        first, length = kv.sink_block_token_num, kv.max_token_num
        if position >= length:
            position = first + (position - first) % (length - first)
        offset = int(kv.get_block_offsets(kv.beam_width)[row, beam, 0, position // kv.tokens_per_block])
        return offset // (kv.num_layers * 2), position % kv.tokens_per_block

    def add(self, seq: int, context: int) -> None:
        row = len(self.kv.sequences)
        self.kv.add_sequence(GenerationSequence(seq, row), context)
        length = context + self.kv.bubble_len
        for position in range(length):  # the context step writes through beam 0
            self.cache[self.entry(row, 0, position)] = (seq, position)
        self.texts[seq] = [list(range(length)) for _ in range(self.kv.beam_width)]

    def step(self, finished: list[bool]) -> None:
        gone = [s.seq_idx for s, over in zip(self.kv.sequences, finished, strict=True) if over]
        self.kv.step(finished)
        for seq in gone:
            del self.texts[seq]
        edits = self.kv.take_edits()
        if edits:
            source, target = zip(*edits.copies, strict=True)
            self.cache[list(target)] = self.cache[list(source)]
        for row, sequence in enumerate(self.kv.sequences):
            for beam, text in enumerate(self.texts[sequence.seq_idx]):
                self.count += 1
                text.append(1000 + self.count)
                self.cache[self.entry(row, beam, len(text) - 1)] = (sequence.seq_idx, text[-1])

    def check(self) -> None:
        kv = self.kv
        kv.policy.check_integrity()
        first, length = kv.sink_block_token_num, kv.max_token_num
        for row, sequence in enumerate(kv.sequences):
            assert sequence.get_batch_idx() == row
            for beam, text in enumerate(self.texts[sequence.seq_idx]):
                assert len(text) == kv.lens[row]
                for position, value in enumerate(text):
                    if position < first or position >= len(text) - (length - first):
                        found = tuple(self.cache[self.entry(row, beam, position)])
                        assert found == (sequence.seq_idx, value), (row, beam, position)


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize(
    ("window", "sink", "one_more"), [(64, 0, False), (12, 0, False), (12, 4, False), (10, 3, True), (9, 5, False)]
)
def test_every_beam_reads_back_what_it_wrote(beams: int, window: int, sink: int, one_more: bool) -> None:
    rng = random.Random(beams)
    kv = KVCacheManager(LAYERS, 40, 8, 4, 16, window, sink, beams, one_more)
    world, next_seq = Beams(kv, 40), 0
    for _ in range(60):
        try:
            # A context of at least the sinks, as sessions ask for, and within the window.
            if rng.random() < 0.3:
                world.add(next_seq, rng.randrange(max(sink, 1), window + 1))
                next_seq += 1
                world.step([False] * len(kv.sequences))
            elif kv.sequences:
                world.step([rng.random() < 0.05 for _ in kv.sequences])
        except CapacityError:
            kv.policy.check_integrity()
            world.step([True] * len(kv.sequences))
        world.check()
    if kv.sequences:
        world.step([True] * len(kv.sequences))
    assert kv.policy.usage().free == 40
    assert next_seq > 5


def test_block() -> None:
    block = Block(7)
    assert (block.idx, block.ref_count, block.has_link(), block.is_shared()) == (7, 0, False, False)
    block.add_link()
    assert (block.has_link(), block.is_shared()) == (True, False)
    block.add_link()
    assert block.is_shared()
    block.remove_link()
    block.remove_link()
    with pytest.raises(ConfigError, match="block 7"):
        block.remove_link()


def test_blocks_manager() -> None:
    blocks = BlocksManager(num_layers=2, num_blocks=5, block_size=4, max_blocks_per_seq=3, beam_width=2)
    one = GenerationSequence(0, 0)
    blocks.allocate(one, share_across_beam=True)
    blocks.allocate(one)
    assert blocks.get_number_blocks(one) == 2
    assert blocks.get_offset_array(2).tolist() == [[[[0, 4, 0], [1, 5, 0]], [[0, 8, 0], [1, 9, 0]]]]
    blocks.replace_shared_block(one, 0)
    assert blocks.get_offset_array(2)[0, :, 0, 0].tolist() == [12, 0]
    blocks.replace_shared_block(one, 0)  # nothing is shared any more
    assert blocks.has_free_block()
    with pytest.raises(RuntimeError, match="Can't allocate new block for KV cache: 2 needed, 1 of 5 free"):
        blocks.allocate(one)
    assert (blocks.get_number_blocks(one), len(blocks.free_blocks)) == (2, 1)
    blocks.allocate(one, share_across_beam=True)
    with pytest.raises(RuntimeError, match="Can't allocate"):
        blocks.replace_shared_block(one, 2)
    with pytest.raises(CapacityError, match="max_blocks_per_seq"):
        blocks.allocate(one)
    blocks.free(one)
    assert len(blocks.free_blocks) == 5
    with pytest.raises(ConfigError, match="no blocks to free"):
        blocks.free(one)


def test_continuous_caches() -> None:
    blocks = BlocksManager(num_layers=2, num_blocks=3, block_size=4, max_blocks_per_seq=2)
    for seq in range(2):
        blocks.allocate(GenerationSequence(seq, seq))
    pool = torch.arange(3 * 2 * 2 * 4).reshape(3, 2, 2, 1, 4)
    caches = blocks.get_continuous_caches(pool)
    assert caches.tolist() == [
        [[0, 1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 0, 0, 0, 0]],
        [[16, 17, 18, 19, 0, 0, 0, 0], [20, 21, 22, 23, 0, 0, 0, 0]],
    ]
    with pytest.raises(ConfigError, match="beam width 1"):
        BlocksManager(1, 1, 1, beam_width=2).get_continuous_caches(pool)
