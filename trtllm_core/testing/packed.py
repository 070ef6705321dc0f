"""Running an engine on ragged rows without a generation loop: the least that puts tokens in and gets logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from trtllm_core.config import EngineConfig
from trtllm_core.parallel import TensorParallel
from trtllm_core.plugin import Executable
from trtllm_core.plugin.kv_policy import Edits, KVModel, KVPlan
from trtllm_core.prompt_table import VirtualTokens, virtual_inputs
from trtllm_core.session import Session, TensorInfo


def kv_plan(config: EngineConfig, num_blocks: int) -> KVPlan:
    """A pool of ``num_blocks`` blocks for one rank of an engine."""
    model, build = config.model, config.build
    return KVPlan(
        num_blocks=num_blocks,
        tokens_per_block=build.tokens_per_block,
        max_blocks_per_slot=-(-build.max_seq_len // build.tokens_per_block),
        model=KVModel(
            num_layers=model.num_layers,
            num_kv_heads=max(model.num_kv_heads // build.tp_size, 1),
            head_size=model.head_size,
            dtype=config.kv_dtype,
            bytes_per_token=model.kv_bytes_per_token(config.kv_dtype, build.tp_size),
            sliding_window=model.sliding_window,
        ),
    )


class PackedRows:
    """Sequences on an engine of the packed, paged contract, each with a block table of its own.

    Every call goes through ``Session``'s checks. ``self.lengths`` may be set back to rewind a row.

    Args:
        engine: the loaded engine. Its pool is allocated anew.
        count: how many rows there may be.
        shuffle: seed of the order in which blocks are handed out; None hands them out in order.
    """

    def __init__(self, engine: Session | Executable, count: int, shuffle: int | None = 0) -> None:
        self.session = engine if isinstance(engine, Session) else Session.from_engine(engine)
        config = self.session.config
        per_row = kv_plan(config, 1).max_blocks_per_slot
        self.plan = kv_plan(config, count * per_row)
        self.session.engine.allocate_kv(self.plan)
        blocks = np.arange(count * per_row, dtype=np.int32)
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(blocks)
        self.blocks = blocks.reshape(count, per_row)
        self.lengths = np.zeros(count, np.int32)
        """Tokens in each row's cache."""
        self.lora_ids = np.full(count, -1, np.int32)
        """Each row's adapter; -1: none. Engines that take none are not told."""
        self.tables: dict[int, VirtualTokens] = {}
        """By row: what its virtual token ids stand for."""

    def inputs(self, tokens: Mapping[int, Sequence[int]]) -> dict[str, torch.Tensor]:
        """The input tensors of one call that appends ``tokens[row]`` to each row, in the order of the mapping."""
        rows = np.array(list(tokens), np.int64)
        counts = np.array([len(ids) for ids in tokens.values()], np.int32)
        past = self.lengths[rows]
        positions = [np.arange(p, p + n, dtype=np.int64) for p, n in zip(past, counts, strict=True)]
        used = -(-(past + counts) // self.plan.tokens_per_block)
        tables = np.where(np.arange(self.blocks.shape[1]) < used[:, None], self.blocks[rows], -1).astype(np.int32)
        lora = self.session.engine.capabilities.lora
        packed = np.array([i for ids in tokens.values() for i in ids], np.int32)
        virtual = virtual_inputs(packed, np.repeat(rows, counts), self.tables)
        return {
            "input_ids": torch.from_numpy(packed),
            "position_ids": torch.from_numpy(np.concatenate(positions)),
            "query_lengths": torch.from_numpy(counts),
            "past_lengths": torch.from_numpy(past),
            "block_tables": torch.from_numpy(tables),
            "logits_indices": torch.arange(int(counts.sum())),
            **({"lora_ids": torch.from_numpy(self.lora_ids[rows])} if lora else {}),
            **virtual,
        }

    def run(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """Append ``tokens[row]`` to each row, all in one call. Returns every row's logits ``[tokens, vocab_size]``."""
        inputs = self.inputs(tokens)
        self.session.set_shapes(inputs)
        infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in inputs.items()]
        (info,) = self.session.infer_shapes(infos)
        logits = torch.full(info.shape, torch.nan, dtype=info.dtype, device=self.session.device)
        self.session.run(inputs, {info.name: logits})
        self.lengths[list(tokens)] += [len(ids) for ids in tokens.values()]
        parts = torch.split(
            logits[:, : self.session.config.model.vocab_size].cpu(), [len(ids) for ids in tokens.values()]
        )
        return dict(zip(tokens, parts, strict=True))

    def fork(self, src: int, dst: int) -> None:
        """Row ``dst`` becomes a copy of row ``src``: whole blocks are shared, one that will be written is copied."""
        length = int(self.lengths[src])
        shared, rest = divmod(length, self.plan.tokens_per_block)
        self.blocks[dst, :shared] = self.blocks[src, :shared]
        if rest:
            copies = ((int(self.blocks[src, shared]), int(self.blocks[dst, shared])),)
            self.session.engine.edit_kv(Edits(copies))
        self.lengths[dst] = length

    def steps(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """As ``run``, one token of every row a call; rows that have no more tokens leave the batch."""
        out: dict[int, list[torch.Tensor]] = {row: [] for row in tokens}
        for i in range(max(map(len, tokens.values()))):
            for row, logits in self.run({row: ids[i : i + 1] for row, ids in tokens.items() if i < len(ids)}).items():
                out[row].append(logits)
        return {row: torch.cat(parts) for row, parts in out.items()}


def rank_logits(
    parallel: TensorParallel, directories: Sequence[Path], prompts: Sequence[Sequence[int]], steps: int
) -> list[list[torch.Tensor]]:
    """For ``trtllm_core.parallel.run_ranks``: what this rank answers for each engine, see ``prefill_and_decode``."""
    sessions = (Session.from_directory(path, parallel.rank, parallel=parallel) for path in directories)
    return [prefill_and_decode(session, prompts, steps) for session in sessions]


def prefill_and_decode(
    engine: Session | Executable, prompts: Sequence[Sequence[int]], steps: int, shuffle: int | None = 0
) -> list[torch.Tensor]:
    """Logits ``[tokens, vocab_size]`` of each prompt: its last ``steps`` tokens one by one, what is before at once."""
    rows = PackedRows(engine, len(prompts), shuffle)
    first = rows.run({row: ids[: len(ids) - steps] for row, ids in enumerate(prompts)})
    later = rows.steps({row: ids[len(ids) - steps :] for row, ids in enumerate(prompts)})
    return [torch.cat((first[row], later[row])) for row in first]
