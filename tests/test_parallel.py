"""Tensor parallelism over real processes (gloo), and the shares that need none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from trtllm_core.config.mapping import Mapping
from trtllm_core.errors import BackendError, CapacityError, ConfigError
from trtllm_core.parallel import TensorParallel, init_tensor_parallel, padded_vocab, run_ranks, shutdown

WAIT = 120.0  # seconds; spawning imports torch in every process


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let spawned processes import this module under whichever import mode pytest runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    shutdown()


# Without processes


def test_one_rank_is_the_identity() -> None:
    one = TensorParallel()
    x = torch.ones(2, 3)
    assert one.all_reduce(x) is x
    assert one.all_gather(x) is x
    assert one.broadcast_object(x) is x
    assert one.span(7) == one.kv_span(7) == range(7)


@pytest.mark.parametrize(("rank", "size"), [(0, 0), (1, 1), (-1, 2)])
def test_rank_outside_the_group(rank: int, size: int) -> None:
    with pytest.raises(ConfigError, match="rank must be in"):
        TensorParallel(rank, size)


def test_shares_that_cannot_be() -> None:
    parallel = TensorParallel(0, 4)
    for n in (6, 3, -4):
        with pytest.raises(ConfigError, match="cannot be shared out evenly"):
            parallel.span(n)
    for heads in (6, 3, 0, -4):
        with pytest.raises(ConfigError, match="evenly over a"):
            parallel.kv_span(heads)


@given(st.integers(1, 16), st.integers(0, 16))
def test_spans_are_a_partition(size: int, share: int) -> None:
    spans = [TensorParallel(rank, size).span(size * share) for rank in range(size)]
    assert [i for span in spans for i in span] == list(range(size * share))


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 4))
def test_replicated_heads_serve_their_query_heads(kv_heads: int, copies: int, queries_per_rank: int) -> None:
    size = kv_heads * copies
    query_heads = size * queries_per_rank
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        (head,) = parallel.kv_span(kv_heads)
        assert {query * kv_heads // query_heads for query in parallel.span(query_heads)} == {head}


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_padded_vocab(vocab: int, size: int) -> None:
    padded = padded_vocab(vocab, size)
    assert padded % size == 0
    assert vocab <= padded < vocab + size


def test_padded_vocab_refuses() -> None:
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            padded_vocab(*sizes)


def test_a_share_alone_cannot_communicate() -> None:
    parallel = TensorParallel(1, 2)
    for call in (parallel.all_reduce, parallel.all_gather, parallel.broadcast_object):
        with pytest.raises(ConfigError, match=r"rank 1 of 2 .* init_tensor_parallel"):
            call(torch.ones(1))


def test_one_rank_starts_nothing() -> None:
    assert init_tensor_parallel(Mapping()) == TensorParallel()
    assert not dist.is_initialized()
    shutdown()


def test_nowhere_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match=r"\(MASTER_ADDR not set\).*torchrun"):
        init_tensor_parallel(Mapping(2, 0, 8, 2, 1))


def test_nobody_comes(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="rank 0 of 2 could not join"):
        init_tensor_parallel(Mapping(2, 0, 8, 2, 1), init_method=(tmp_path / "meet").as_uri(), timeout=0.5)


def test_a_group_of_another_world(no_group: None, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=(tmp_path / "meet").as_uri(), rank=0, world_size=1)
    with pytest.raises(ConfigError, match=r"rank 0 of 1, but its mapping says rank 1 of 2"):
        init_tensor_parallel(Mapping(2, 1, 8, 2, 1))


# Over processes


def collectives(parallel: TensorParallel, base: torch.Tensor) -> dict[str, Any]:
    rank = parallel.rank
    x = base + rank
    before = x.data_ptr()
    reduced = parallel.all_reduce(x)
    block = torch.arange(6).view(1, 2, 3) + 100 * rank
    return {
        "rank": rank,
        "in_place": reduced is x and reduced.data_ptr() == before,
        "sum": reduced,
        "half": {t: parallel.all_reduce(torch.ones(3, dtype=t)) for t in (torch.bfloat16, torch.float16)},
        "gathered": {dim: parallel.all_gather(block, dim) for dim in (-1, -3, 0, 1, 2)},
        "transposed": parallel.all_gather(block.transpose(1, 2)),
        "contiguous": parallel.all_gather(block).is_contiguous(),
        "object": parallel.broadcast_object({"from": rank}),
        "other": parallel.broadcast_object({"from": rank} if rank == 1 else None, src=1),
        "same": init_tensor_parallel(Mapping(2, rank, 8, 2, 1)).group is parallel.group,
        "asked": init_tensor_parallel(Mapping(2, rank, 8, 2, 1), backend="gloo").group is not parallel.group,
        "threads": torch.get_num_threads(),
    }


def test_two_ranks() -> None:
    base = torch.arange(4.0)
    results = run_ranks(collectives, 2, base, timeout=WAIT, backend="gloo")
    blocks = [torch.arange(6).view(1, 2, 3), torch.arange(6).view(1, 2, 3) + 100]
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        assert torch.equal(result["sum"], 2 * base + 1)
        assert all(half.tolist() == [2, 2, 2] for half in result["half"].values())
        for dim, gathered in result["gathered"].items():
            assert torch.equal(gathered, torch.cat(blocks, dim))
        assert torch.equal(result["transposed"], torch.cat([block.transpose(1, 2) for block in blocks], -1))
        assert result["object"] == {"from": 0}
        assert result["other"] == {"from": 1}
        assert result["in_place"]
        assert result["contiguous"]
        assert result["same"]
        assert result["asked"]
        assert result["threads"] == max(1, torch.get_num_threads() // 2)


def stages(parallel: TensorParallel) -> tuple[int, float, Any, bool]:
    """Two pipeline stages of two, inside the world of four that run_ranks made."""
    pair = init_tensor_parallel(Mapping(4, parallel.rank, 8, 2, 2), timeout=WAIT)
    total = pair.all_reduce(torch.tensor([float(parallel.rank)])).item()
    alone = init_tensor_parallel(Mapping(4, parallel.rank, 8, 1, 4)) == TensorParallel()
    return pair.rank, total, pair.broadcast_object(parallel.rank, src=1), alone


def test_groups_of_a_pipeline() -> None:
    results = run_ranks(stages, 4, timeout=WAIT, backend="gloo")
    assert results == [(0, 1.0, 1, True), (1, 1.0, 1, True), (0, 5.0, 3, True), (1, 5.0, 3, True)]


class OddError(Exception):
    """Cannot be pickled: it needs two arguments, and hands one to its base."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def trouble(parallel: TensorParallel, kind: str) -> Any:
    if parallel.rank != 1:
        return parallel.all_reduce(torch.ones(1)) if parallel.size > 1 else None  # waits for rank 1
    if kind == "exit":
        os._exit(3)
    if kind == "sleep":
        time.sleep(WAIT)
    if kind == "result":
        return lambda: None
    raise {"capacity": CapacityError("no room"), "odd": OddError("a", "b"), "os": OSError(2, "gone")}[kind]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("capacity", CapacityError, "^rank 1: no room"),
        ("odd", BackendError, "^rank 1: OddError: ab"),
        ("os", BackendError, r"^rank 1: FileNotFoundError: \[Errno 2\] gone"),
        ("result", Exception, "^rank 1: "),
        ("exit", BackendError, r"^rank 1 of 2 died without a result \(exit code 3\)$"),
    ],
)
def test_a_rank_that_fails_ends_all(kind: str, error: type[Exception], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        run_ranks(trouble, 2, kind, timeout=WAIT, backend="gloo")
    assert time.monotonic() - start < WAIT / 2
    if kind != "exit":
        assert "Traceback of rank 1" in caught.value.__notes__[0]


def test_a_rank_that_never_ends() -> None:
    with pytest.raises(BackendError, match=r"rank .*1 of 2 did not finish within 12 s"):
        run_ranks(trouble, 2, "sleep", timeout=12.0, backend="gloo")


def test_what_cannot_be_run() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        run_ranks(stages, 0)
    with pytest.raises(Exception, match=r"(?i)pickle"):
        run_ranks(lambda parallel: None, 1, timeout=WAIT)


def test_one_process() -> None:
    assert run_ranks(trouble, 1, "capacity", timeout=WAIT) == [None]


def linger(parallel: TensorParallel) -> None:
    os.write(1, f"{parallel.rank}\n".encode())  # in one piece: both ranks write to one pipe
    time.sleep(WAIT)


def test_ranks_die_with_their_parent() -> None:
    code = f"import {__name__} as tests; tests.run_ranks(tests.linger, 2, backend='gloo')"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert {parent.stdout.readline(), parent.stdout.readline()} == {"0\n", "1\n"}
        parent.kill()
        parent.communicate(timeout=WAIT / 4)  # ends when the last process that holds the pipe has ended
