"""Prompt tables (p-tuning): embeddings that stand in a prompt where virtual token ids do.

A table is ``[num_tasks, task_vocab, hidden_size]``. In the prompt of a request of task ``t``, the token id
``vocab_size + i`` stands for row ``i`` of the table's task ``t``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_core.config import EngineConfig
from trtllm_core.errors import CapacityError, ConfigError

Table = torch.Tensor | np.ndarray | Path | str
"""A table, or the path of a ``.npy`` file that holds one."""


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """One task of a table: what the virtual ids of a request stand for."""

    rows: torch.Tensor
    """``[task_vocab, hidden_size]``, of the engine's dtype, on its device."""
    first: int
    """The id of the first row: the size of the vocabulary."""

    @cached_property
    def key(self) -> str:
        """Equal where the embeddings are: what cached keys and values depend on."""
        raw = self.rows.detach().cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.blake2b(raw.data, digest_size=16).hexdigest()

    def check(self, prompt: Sequence[int], name: str) -> None:
        """Refuse ids beyond the table.

        Raises:
            ConfigError: the prompt has one.
        """
        largest = max(prompt, default=0)
        if largest >= self.first + len(self.rows):
            raise ConfigError(
                f"{name} has virtual token id {largest}: its task's table has {len(self.rows)} rows, ids {self.first} "
                f"to {self.first + len(self.rows) - 1}"
            )


def virtual_tokens(
    table: Table | Sequence[Table | None] | None,
    tasks: str | Sequence[int] | torch.Tensor | None,
    batch: int,
    config: EngineConfig,
    device: torch.device,
) -> list[VirtualTokens | None]:
    """What the virtual ids of each request of a batch stand for.

    Args:
        table: one for all requests, or a list of one for each, None for requests without.
        tasks: of each request, as integers or as classic text such as ``"0,3,1,0"``; None is task 0 for all.
        batch: number of requests.

    Raises:
        ConfigError: the engine was not built for tables, or table or tasks are not what they should be.
        CapacityError: a table is larger than the engine was built for.
    """
    if table is None and tasks is None:
        return [None] * batch
    if table is None:
        raise ConfigError(
            "prompt_tasks says which task of a prompt table each prompt uses, but there is no prompt_table"
        )
    if not config.build.max_prompt_embedding_table_size:
        raise ConfigError("the engine was not built for prompt tables: build it with max_prompt_embedding_table_size")
    numbers = _tasks(tasks, batch)
    if isinstance(table, (torch.Tensor, np.ndarray, Path, str)):
        one = _read(table, config, device)
        return [_task(one, number, config) for number in numbers]
    if len(table) != batch:
        raise ConfigError(f"prompt_table has {len(table)} tables for {batch} prompts")
    tables = [None if each is None else _read(each, config, device) for each in table]
    return [None if one is None else _task(one, number, config) for one, number in zip(tables, numbers, strict=True)]


def by_task(rows: torch.Tensor, task_vocab: int | torch.Tensor | None) -> torch.Tensor:
    """A table from its rows ``[num_tasks * task_vocab, hidden_size]``, as classic sessions took it; a table stays.

    Raises:
        ConfigError: the rows do not make up whole tasks.
    """
    if rows.dim() != 2:
        return rows
    size = len(rows) if task_vocab is None else int(task_vocab)
    if size < 1 or len(rows) % size:
        raise ConfigError(f"prompt_embedding_table has {len(rows)} rows, not a multiple of prompt_vocab_size {size}")
    return rows.view(-1, size, rows.shape[1])


def virtual_inputs(ids: np.ndarray, slots: np.ndarray, tables: Mapping[int, VirtualTokens]) -> dict[str, torch.Tensor]:
    """The engine's inputs for the virtual ids of a step; nothing where there is none.

    Args:
        ids: integers ``[tokens]``: virtual ones are replaced by 0, in place.
        slots: integers ``[tokens]``: whose each token is. Tokens of a slot stand together.
        tables: by slot, of the requests that have one.
    """
    places, rows = [], []
    for slot, virtual in tables.items():
        at = np.flatnonzero((slots == slot) & (ids >= virtual.first))
        if len(at):
            places.append(at)
            rows.append(virtual.rows[torch.from_numpy(ids[at] - virtual.first).to(virtual.rows.device)])
    if not places:
        return {}
    where = np.concatenate(places)
    ids[where] = 0
    return {"virtual_tokens": torch.from_numpy(where), "virtual_embeddings": torch.cat(rows)}


def _tasks(tasks: str | Sequence[int] | torch.Tensor | None, batch: int) -> list[int]:
    if tasks is None:
        return [0] * batch
    given: Any = tasks.split(",") if isinstance(tasks, str) else tasks
    try:
        numbers = [int(number) for number in given]
    except (TypeError, ValueError):
        raise ConfigError(f'prompt_tasks is {tasks!r}: write numbers, such as "0,3,1,0"') from None
    if len(numbers) != batch:
        raise ConfigError(f"prompt_tasks has {len(numbers)} tasks for {batch} prompts: it takes one for each")
    return numbers


def _task(table: torch.Tensor, number: int, config: EngineConfig) -> VirtualTokens:
    if not 0 <= number < len(table):
        raise ConfigError(f"prompt_tasks has task {number}; the prompt table has tasks 0 to {len(table) - 1}")
    # A copy: what the caller does with the table afterwards must not reach prompts on their way, nor the key of reuse.
    return VirtualTokens(table[number].clone(), config.model.vocab_size)


def _read(table: Table, config: EngineConfig, device: torch.device) -> torch.Tensor:
    where = "prompt_table"
    if isinstance(table, (str, Path)):
        where = f"prompt_table {table}"
        try:
            table = np.load(table, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where} cannot be read as a .npy file: {error}") from error
    if isinstance(table, np.ndarray):
        table = table.astype(table.dtype.newbyteorder("="), copy=False)
    table = torch.as_tensor(table)
    hidden, most = config.model.hidden_size, config.build.max_prompt_embedding_table_size
    if table.dim() != 3 or table.shape[2] != hidden or not table.numel():
        raise ConfigError(f"{where} is {list(table.shape)}, where [num_tasks, task_vocab, {hidden}] is due")
    if not table.is_floating_point():
        raise ConfigError(f"{where} is of {table.dtype}: embeddings are floating-point numbers")
    if not table.isfinite().all():
        raise ConfigError(f"{where} has values that are not finite")
    size = table.shape[0] * table.shape[1]
    if size > most:
        raise CapacityError(
            f"{where} has {size} rows over all tasks; the engine was built for max_prompt_embedding_table_size {most}"
        )
    return table.to(device, getattr(torch, config.model.dtype))
