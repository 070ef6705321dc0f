"""Tensors and objects between ranks: one tensor-parallel group, on torch.distributed.

Nothing here is kept in a module: a :class:`TensorParallel` is passed to whoever shares work with other ranks.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from trtllm_core.config.mapping import Mapping
from trtllm_core.errors import BackendError, ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place in a tensor-parallel group, and what it can do with the others.

    With ``size`` 1 every method is the identity and calls nothing. Without a ``group`` only the shares (``span``,
    ``kv_span``) are of use: enough to build one rank's weights. A rank outside ``[0, size)`` raises ConfigError.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"TensorParallel: rank must be in [0, {self.size}), got {self.rank}")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` (any shape, contiguous, alike on all ranks) over the ranks, in place; returns ``x``."""
        if self.size > 1:
            dist.all_reduce(x, group=self._joined())
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' ``x`` (one shape on all ranks, at least 1-d) along ``dim``, in rank order.

        Returns ``x`` itself with ``size`` 1, else a new contiguous tensor, ``size`` times as long along ``dim``.
        """
        if self.size == 1:
            return x
        dim = dim if dim >= 0 else dim + x.dim()
        parts = x.new_empty((self.size * x.shape[0], *x.shape[1:]))  # the one layout that gloo and NCCL both take
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self._joined())
        return parts.view(self.size, *x.shape).movedim(0, dim).flatten(dim, dim + 1)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """The picklable ``obj`` of the group's rank ``src``; what the other ranks pass is ignored."""
        if self.size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, group=self._joined(), group_src=src)
        return box[0]

    def span(self, n: int) -> range:
        """This rank's contiguous share of ``n`` rows, columns or heads.

        Raises:
            ConfigError: when ``n`` is not a multiple of ``size``.
        """
        share, rest = divmod(n, self.size)
        if rest or n < 0:
            raise ConfigError(f"{n} cannot be shared out evenly over a tensor-parallel size of {self.size}")
        return range(self.rank * share, (self.rank + 1) * share)

    def kv_span(self, num_kv_heads: int) -> range:
        """This rank's key/value heads; with fewer heads than ranks, each head is held by several neighbours.

        In that case rank ``r`` holds head ``r * num_kv_heads // size``, the head that its query heads attend to.

        Raises:
            ConfigError: when neither of ``num_kv_heads`` and ``size`` is a multiple of the other.
        """
        if num_kv_heads >= self.size:
            return self.span(num_kv_heads)
        if num_kv_heads < 1 or self.size % num_kv_heads:
            raise ConfigError(
                f"{num_kv_heads} key/value heads can neither be shared out nor replicated evenly over a "
                f"tensor-parallel size of {self.size}"
            )
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)

    def _joined(self) -> dist.ProcessGroup:
        if self.group is None:
            raise ConfigError(
                f"rank {self.rank} of {self.size} has joined no process group: make it with init_tensor_parallel()"
            )
        return self.group


def padded_vocab(vocab_size: int, size: int) -> int:
    """``vocab_size`` rounded up to a multiple of ``size``, so that each rank holds as many rows."""
    if vocab_size < 1 or size < 1:
        raise ConfigError(f"vocab_size and size must be at least 1, got {vocab_size} and {size}")
    return -(-vocab_size // size) * size


def init_tensor_parallel(
    mapping: Mapping, *, backend: str | None = None, init_method: str | None = None, timeout: float = 600.0
) -> TensorParallel:
    """Join the other ranks of ``mapping`` and return this rank's tensor-parallel group. All ranks must call it.

    A world of one rank starts nothing. A default process group that exists already is used, and ``init_method`` then
    is not read. The caller chooses the CUDA device (``mapping.local_rank``).

    Args:
        mapping: the world, and this rank's place in it.
        backend: as torch.distributed names it; None is gloo for CPU tensors and objects, NCCL for CUDA tensors.
        init_method: where the ranks meet, such as ``tcp://host:port``; None reads torchrun's environment variables.
        timeout: seconds that joining may take, and later each exchange of a group made here.

    Raises:
        ConfigError: when nothing says where to meet, or the default group that exists is of another world.
        BackendError: when the ranks do not find each other.
    """
    if mapping.world_size == 1:
        return TensorParallel()
    limit = timedelta(seconds=timeout)
    joined = dist.is_initialized()
    if joined:
        if (dist.get_rank(), dist.get_world_size()) != (mapping.rank, mapping.world_size):
            raise ConfigError(
                f"this process has joined torch.distributed as rank {dist.get_rank()} of {dist.get_world_size()}, "
                f"but its mapping says rank {mapping.rank} of {mapping.world_size}"
            )
    else:
        _join(mapping, backend or _default_backend(), init_method, limit)
    if not mapping.has_tp():
        return TensorParallel()
    group = dist.group.WORLD
    if mapping.has_pp() or (joined and backend):  # a group that exists may have another backend than was asked for
        split = dist.new_subgroups_by_enumeration
        group, _ = split(mapping.tp_groups, timeout=limit, backend=backend)  # type: ignore[no-untyped-call,unused-ignore]
    return TensorParallel(mapping.tp_rank, mapping.tp_size, group)


def shutdown() -> None:
    """Leave all process groups, the default one too, whoever made it. Does nothing where there are none."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _default_backend() -> str:
    # One group for both kinds of tensor: plans travel over gloo, and so never make the GPU wait.
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def _join(mapping: Mapping, backend: str, init_method: str | None, limit: timedelta) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if init_method is None and missing:
        raise ConfigError(
            f"nothing says where the {mapping.world_size} ranks meet ({' and '.join(missing)} not set): start them "
            "with torchrun, or give init_method='tcp://HOST:PORT'"
        )
    try:
        dist.init_process_group(
            backend, init_method=init_method, rank=mapping.rank, world_size=mapping.world_size, timeout=limit
        )
    except (ValueError, RuntimeError) as error:
        raise BackendError(f"rank {mapping.rank} of {mapping.world_size} could not join the others: {error}") from error
    atexit.register(shutdown)  # a group whose threads still run when the program ends aborts it


def run_ranks(
    fn: Callable[..., T], size: int, *args: Any, timeout: float = 600.0, backend: str | None = None
) -> list[T]:
    """Call ``fn(tensor_parallel, *args)`` in ``size`` new processes of this machine; their results, in rank order.

    Processes are spawned, so ``fn`` and ``args`` must be picklable (``fn`` at module level) and a script needs its
    ``__main__`` guard. With GPUs, each rank's current CUDA device is its own. No process outlives the call, which may
    take ``timeout`` seconds in all. ``backend`` is that of :func:`init_tensor_parallel`.

    Raises:
        Exception: the first that a rank raised, with the rank in its message and its traceback as a note; a
            BackendError in its place where the exception cannot travel between processes, or carry the rank.
        BackendError: when a rank died, or the time was up.
        ConfigError: for a ``size`` below 1.
    """
    if size < 1:
        raise ConfigError(f"run_ranks: size must be at least 1, got {size}")
    context = mp.get_context("spawn")
    threads = max(1, torch.get_num_threads() // size)
    ranks: list[tuple[SpawnProcess, Connection]] = []
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="trtllm-core-") as folder:
        meet = (Path(folder) / "meet").as_uri()
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                mapping = Mapping(world_size=size, rank=rank, gpus_per_node=size, tp_size=size)
                join = partial(init_tensor_parallel, mapping, backend=backend, init_method=meet, timeout=timeout)
                process = context.Process(target=_rank_main, args=(rank, threads, theirs, join, fn, args))
                process.start()
                theirs.close()  # so that the rank's death ends the connection
                ranks.append((process, ours))
            results: list[T] = _collect(ranks, deadline, timeout)
            for _, ours in ranks:
                ours.close()  # releases the rank
            for process, _ in ranks:
                process.join(timeout=10.0)
            return results
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _collect(ranks: Sequence[tuple[SpawnProcess, Connection]], deadline: float, timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(ranks)
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(map(str, waiting.values()))
            raise BackendError(f"rank {late} of {len(ranks)} did not finish within {timeout:g} s")
        reports = [(waiting.pop(c), _receive(c)) for c in list(waiting) if c in ready]
        # A rank that died comes first: the others' errors would only say that it is gone.
        for rank, report in sorted(reports, key=lambda item: item[1] is not None):
            if report is None:
                process = ranks[rank][0]
                process.join(timeout=10.0)
                raise BackendError(f"rank {rank} of {len(ranks)} died without a result (exit code {process.exitcode})")
            done, value = pickle.loads(report)
            if not done:
                _reraise(rank, *value)
            results[rank] = value
    return results


def _receive(connection: Connection) -> bytes | None:
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None


def _reraise(rank: int, error: Exception | None, summary: str, trace: str) -> NoReturn:
    if error is not None:
        error.args = (f"rank {rank}: {error}", *error.args[1:])
    if error is None or f"rank {rank}: " not in str(error):  # not all make their message of args
        error = BackendError(f"rank {rank}: {summary}")
    error.add_note(f"Traceback of rank {rank}:\n{trace}")
    raise error


def _rank_main(
    rank: int, threads: int, parent: Connection, join: Callable[[], TensorParallel], fn: Callable[..., Any], args: Any
) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)  # the ranks share the machine's cores
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        report = pickle.dumps((True, fn(join(), *args)))
    except Exception as error:
        report = pickle.dumps((False, _portable(error)))
    parent.send_bytes(report)
    # Nobody leaves before the parent says so: a connection that closes early would look like an error to the others.
    parent.poll(None)
    shutdown()


def _portable(error: Exception) -> tuple[Exception | None, str, str]:
    summary = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return None, summary, trace
    return error, summary, trace


def _die_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # the main thread may be inside a collective that nobody will answer
