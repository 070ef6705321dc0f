"""Peak memory of an engine, ours or a peer's, in a process of its own: ``python -m trtllm_core.cli.footprint JSON``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from trtllm_core.cli.measure import Workload, peak_memory, time_engine
from trtllm_core.errors import BackendError


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
    """What was resident before anything was loaded: Python and PyTorch."""
    weights: int = 0
    kv: int = 0
    device_peak: int = 0
    """Most that was ever allocated on the GPU by PyTorch; 0 where there is none."""


def measure(job: Job) -> Footprint:
    """Run a job in a new process.

    Raises:
        BackendError: the process failed.
    """
    command = [sys.executable, "-m", "trtllm_core.cli.footprint", json.dumps(asdict(job))]
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
        from trtllm_core.cli.peers import PeerSource, load_peer

        peer = load_peer(PeerSource(**job.peer), job.device)
        for work in job.works:
            peer.time(work)
        return Footprint(peak_memory(), imported, device_peak=_device_peak(job.device))
    from trtllm_core.cli.subject import Subject

    runner = Subject(**job.subject).load(job.device)
    for work in job.works:
        time_engine(runner, work)
    kv = runner.generation.loop.cache.bytes
    return Footprint(peak_memory(), imported, runner.context_mem_size, kv, _device_peak(job.device))


def _device_peak(device: str) -> int:
    import torch

    place = torch.device(device)
    return torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    values["works"] = [Workload(**work) for work in values["works"]]
    print(json.dumps(asdict(_run(Job(**values)))))
