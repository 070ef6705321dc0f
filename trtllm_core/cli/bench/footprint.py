"""Peak memory of an engine, ours or a peer's, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trtllm_core.cli.bench.timing import peak_memory, time_engine
from trtllm_core.cli.bench.workloads import Workload
from trtllm_core.errors import BackendError

if TYPE_CHECKING:
    import torch

    from trtllm_core.runner import ModelRunner


_PROGRAM = f"from {__name__} import main; main()"


@dataclass(frozen=True)
class Job:
    """What the process is to load and run."""

    subject: dict[str, Any]
    """See ``Subject.as_json``."""
    works: list[Workload]
    threads: int | None
    device: str
    peer: dict[str, Any] | None = None
    """Fields of a ``PeerSource``, to run instead of the subject."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory: the host's, unless it says otherwise."""

    peak: int
    """Most that was resident, the mapped weights included."""
    imported: int
    """What was resident before anything was loaded: Python and PyTorch; 0 where nobody looked."""
    weights: int = 0
    kv: int = 0
    device_peak: int = 0
    """Most that was ever allocated on the GPU by PyTorch; 0 where there is none."""


def measure(job: Job) -> Footprint:
    """Run a job in a new process.

    Raises:
        BackendError: the process failed.
    """
    command = [sys.executable, "-c", _PROGRAM, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"the process that measures memory failed with status {done.returncode}: {last}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _run(job: Job) -> Footprint:
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    imported = peak_memory()
    if job.peer is not None:
        from trtllm_core.cli.bench.peers import PeerSource, load_peer

        peer = load_peer(PeerSource(**job.peer), job.device)
        for work in job.works:
            peer.time(work)
        return Footprint(peak_memory(), imported, device_peak=_device_peak(job.device))
    from trtllm_core.cli.bench.subject import Subject

    runner = Subject(**job.subject).load(job.device)
    for work in job.works:
        time_engine(runner, work)
    return of_this_process(runner, imported)


def of_this_process(runner: ModelRunner, imported: int = 0) -> Footprint:
    """After it has run the work, and nothing else since ``forget_device_peak``."""
    weights, kv = runner.context_mem_size, runner.generation.loop.cache.bytes
    return Footprint(peak_memory(), imported, weights, kv, _device_peak(str(runner.device)))


def forget_device_peak(device: torch.device) -> None:
    """Start anew from what is allocated now: what came before was not the work."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _device_peak(device: str) -> int:
    import torch

    place = torch.device(device)
    return torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0


def main() -> None:
    """What the new process does: the job is its argument, the footprint its last line."""
    values = json.loads(sys.argv[1])
    values["works"] = [Workload(**work) for work in values["works"]]
    print(json.dumps(asdict(_run(Job(**values)))))
