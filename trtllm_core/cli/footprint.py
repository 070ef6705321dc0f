"""Peak memory of an engine, ours or a peer's, in a process of its own: ``python -m trtllm_core.cli.footprint JSON``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from trtllm_core.cli.measure import Workload, peak_memory, time_engine
from trtllm_core.errors import BackendError


@dataclass(frozen=True)
class Job:
    """What the process is to load and run."""

    engine: str
    works: list[Workload]
    threads: int | None
    device: str
    peer: str | None = None
    checkpoint: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Footprint:
    """Bytes of host memory."""

    peak: int
    """Most that was resident, the mapped weights included."""
    imported: int
    """What was resident before anything was loaded: Python and PyTorch."""
    weights: int = 0
    kv: int = 0


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
        from trtllm_core.cli.peers import load_peer

        peer = load_peer(job.peer, Path(job.checkpoint), job.dtype, job.device)
        for work in job.works:
            peer.time(work)
        return Footprint(peak_memory(), imported)
    from trtllm_core.runner import ModelRunner

    runner = ModelRunner.from_dir(job.engine, device=job.device)
    for work in job.works:
        time_engine(runner, work)
    return Footprint(peak_memory(), imported, runner.context_mem_size, runner.generation.loop.cache.bytes)


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    values["works"] = [Workload(**work) for work in values["works"]]
    print(json.dumps(asdict(_run(Job(**values)))))
