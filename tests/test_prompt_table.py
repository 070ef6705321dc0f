"""Prompt tables: what is read, what is refused, and what an engine is given for virtual ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trtllm_core.config import BuildConfig, EngineConfig
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.prompt_table import VirtualTokens, virtual_inputs, virtual_tokens
from trtllm_core.testing.markov import MarkovExecutable

HIDDEN, VOCAB = 8, 97
CPU = torch.device("cpu")
TABLE = torch.arange(3 * 4 * HIDDEN).view(3, 4, HIDDEN).double()


def config(most: int = 12) -> EngineConfig:
    return MarkovExecutable(build=BuildConfig(max_prompt_embedding_table_size=most)).config


def rows(table: Any, tasks: Any, batch: int = 2) -> list[Any]:
    return [None if one is None else one.rows for one in virtual_tokens(table, tasks, batch, config(), CPU)]


@pytest.mark.parametrize("tasks", ["2,0", "2, 0", [2, 0], torch.tensor([2, 0])])
def test_tasks_choose_a_part_of_the_table(tasks: Any) -> None:
    first, second = rows(TABLE, tasks)
    assert first.dtype == second.dtype == torch.float32, "as the engine computes"
    assert torch.equal(first, TABLE[2].float())
    assert torch.equal(second, TABLE[0].float())


def test_defaults_and_lists() -> None:
    assert all(torch.equal(one, TABLE[0].float()) for one in rows(TABLE, None))
    assert virtual_tokens(None, None, 3, config(0), CPU) == [None] * 3
    first, second, third = rows([TABLE, None, TABLE[1:]], "1,0,1", 3)
    assert second is None
    assert torch.equal(first, TABLE[1].float())
    assert torch.equal(third, TABLE[2].float())


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    np.save(path, TABLE.numpy().astype(np.float16))
    for source in (path, str(path), np.load(path)):
        assert torch.equal(rows(source, "1", 1)[0], TABLE[1].float())


@pytest.mark.parametrize(
    ("table", "tasks", "error", "words"),
    [
        (None, "0,0", ConfigError, "there is no prompt_table"),
        (TABLE, "0", ConfigError, "prompt_tasks has 1 tasks for 2 prompts"),
        (TABLE, "0,3", ConfigError, "task 3; the prompt table has tasks 0 to 2"),
        (TABLE, "0,-1", ConfigError, "task -1"),
        (TABLE, "0;1", ConfigError, 'prompt_tasks is .0;1.: write numbers, such as "0,3,1,0"'),
        (TABLE[0], None, ConfigError, r"\[4, 8\], where \[num_tasks, task_vocab, 8\] is due"),
        (TABLE[:, :, :7], None, ConfigError, r"\[3, 4, 7\], where \[num_tasks, task_vocab, 8\]"),
        (TABLE[:, :0], None, ConfigError, r"\[3, 0, 8\], where"),
        (TABLE.long(), None, ConfigError, "of torch.int64: embeddings are floating-point"),
        (TABLE * float("nan"), None, ConfigError, "values that are not finite"),
        (TABLE.repeat(2, 1, 1), None, CapacityError, "24 rows over all tasks; .* max_prompt_embedding_table_size 12"),
        ([TABLE], None, ConfigError, "prompt_table has 1 tables for 2 prompts"),
        ("nowhere.npy", None, ConfigError, "prompt_table nowhere.npy cannot be read as a .npy file"),
    ],
)
def test_refusals(table: Any, tasks: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        rows(table, tasks)


def test_engines_that_take_none() -> None:
    with pytest.raises(ConfigError, match="not built for prompt tables: build it with max_prompt_embedding_table_size"):
        virtual_tokens(TABLE, None, 1, config(0), CPU)


def test_a_file_of_another_machine(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", TABLE.float().numpy().astype(">f4"))
    assert torch.equal(rows(tmp_path / "table.npy", "1", 1)[0], TABLE[1].float())


def test_the_caller_keeps_the_table() -> None:
    """What happens to it afterwards reaches no prompt."""
    table = TABLE.clone()
    (one,) = rows(table, "1", 1)
    table.zero_()
    assert torch.equal(one, TABLE[1])


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "table.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match="cannot be read as a .npy file"):
        rows(tmp_path / "table.npy", None)


def test_ids_beyond_the_table() -> None:
    (one,) = virtual_tokens(TABLE, None, 1, config(), CPU)
    assert one is not None
    one.check([5, VOCAB, VOCAB + 3], "prompt 0")
    with pytest.raises(
        ConfigError, match="prompt 0 has virtual token id 101: its task's table has 4 rows, ids 97 to 100"
    ):
        one.check([5, VOCAB + 4], "prompt 0")


def test_keys_follow_the_embeddings() -> None:
    a, b = virtual_tokens(TABLE, "0,1", 2, config(), CPU)
    c, d = virtual_tokens(TABLE.float()[[1, 0]], "0,1", 2, config(), CPU)
    assert a is not None and b is not None and c is not None and d is not None  # noqa: PT018
    assert a.key == d.key != b.key == c.key


def test_inputs_of_a_step() -> None:
    tables = {4: VirtualTokens(TABLE[0].float(), VOCAB), 2: VirtualTokens(TABLE[1].float(), VOCAB)}
    ids = np.array([7, VOCAB + 3, VOCAB, 9, VOCAB + 1, 96], np.int32)
    slots = np.array([4, 4, 4, 3, 2, 2])
    inputs = virtual_inputs(ids, slots, tables)
    assert ids.tolist() == [7, 0, 0, 9, 0, 96]
    assert inputs["virtual_tokens"].tolist() == [1, 2, 4]
    assert torch.equal(inputs["virtual_embeddings"], torch.stack([TABLE[0, 3], TABLE[0, 0], TABLE[1, 1]]).float())
    assert virtual_inputs(np.array([7, 9]), np.array([4, 3]), tables) == {}
