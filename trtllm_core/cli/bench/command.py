"""The command line of ``trtllm-core bench``."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from trtllm_core.cli.bench import report, scale, serving
from trtllm_core.cli.bench.bandwidth import read_bandwidth
from trtllm_core.cli.bench.continuous import ContinuousPeer
from trtllm_core.cli.bench.footprint import Footprint, Job, forget_device_peak, measure, of_this_process
from trtllm_core.cli.bench.limits import speed_limit
from trtllm_core.cli.bench.matrices import matrix_rate
from trtllm_core.cli.bench.options import MODES, TAKES, SubjectOptions, TraceOptions, WorkOptions
from trtllm_core.cli.bench.peers import Peer, PeerSource, load_peer, peer_source
from trtllm_core.cli.bench.plot import check_plot, plot_rows
from trtllm_core.cli.bench.rows import Row, batch_speedup
from trtllm_core.cli.bench.subject import Subject, subject_of
from trtllm_core.cli.bench.timing import time_engine
from trtllm_core.cli.bench.trace import Trace
from trtllm_core.cli.bench.workloads import Lengths, Workload
from trtllm_core.cli.console import print_json, print_note, stderr
from trtllm_core.cli.options import takes
from trtllm_core.errors import ConfigError
from trtllm_core.version import __version__

if TYPE_CHECKING:
    from trtllm_core.runner import ModelRunner

ROUNDING_TOKENS = 64
"""Of a prompt, whose logits tell what rounded activations cost."""
BUSY = 0.5
"""Of our threads: as much work of others spoils a measurement. Threads that wait for each other suffer most."""


@takes(what=SubjectOptions, work=WorkOptions, served=TraceOptions)
def bench(
    what: SubjectOptions,
    work: WorkOptions,
    served: TraceOptions,
    engine: Annotated[
        Path | None, typer.Argument(metavar="[ENGINE]", help="An engine that `trtllm-core build` made.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="latency (a prompt, then decoding at each batch size), prefill, throughput or scale.")
    ] = "latency",
    repeats: Annotated[int, typer.Option(help="Timed runs of each; the median counts.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: PyTorch's).", min=1)] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Measure peak memory, on the CPU in processes of their own.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the numbers, a PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure prefill, decoding, serving and memory, side by side with a peer on the same weights and threads."""
    import torch

    _check(mode, [*work.given(), *served.given(), *what.given()], plot)
    if threads is not None:
        torch.set_num_threads(threads)
    run = _Run(repeats, threads, device, memory, _load_average())
    if mode == "throughput":
        trace = served.make()
        slots = served.slots or min(len(trace.requests), 256)
        subject = subject_of(engine, what.shape, what.random(), trace.limits(slots), what.backend())
        if served.slots is not None and subject.engine:
            raise ConfigError("--slots is for random weights (--shape): an engine was built for its own")
        found = _throughput(run, subject, trace, what.peer, what.checkpoint)
    elif mode == "scale":
        found = _scale(run, engine, what, work)
    else:
        lengths = work.lengths("prefill" if mode == "prefill" else "latency")
        subject = subject_of(engine, what.shape, what.random(), lengths.limits(), what.backend())
        found = _latency(run, subject, lengths, what.peer, what.checkpoint)
        if plot is not None:
            plot_rows(found, plot)
    if as_json:
        print_json(found)
    elif mode == "throughput":
        report.print_throughput(found)
    elif mode == "scale":
        report.print_scale(found)
    else:
        report.print_latency(found)


@dataclass(frozen=True)
class _Run:
    """How the work is run."""

    repeats: int
    threads: int | None
    device: str
    memory: bool
    load: float
    """Threads that wanted to run just before, on average: other people's work."""

    def warn(self) -> None:
        """Say that the machine does other work too, where it does."""
        import torch

        if self.load > BUSY * torch.get_num_threads():
            print_note(
                f"this machine is busy (load average {self.load:.1f} with {torch.get_num_threads()} threads to use): "
                "neither rates nor ratios mean much"
            )

    def about(self, subject: Subject, runner: ModelRunner) -> dict[str, Any]:
        """What belongs beside any figure."""
        import torch

        quantized = runner.config.quantization
        return {
            "name": subject.name,
            "engine": subject.engine or None,
            "shape": subject.shape or None,
            "backend": runner.config.backend.name,
            "dtype": runner.config.model.dtype,
            "quantization": quantized and quantized.weights,
            "kv_dtype": runner.config.kv_dtype,
            "device": str(runner.device),
            "device_name": _device_name(runner.device),
            "threads": torch.get_num_threads(),
            "trtllm_core": __version__,
            "torch": torch.__version__,
            "repeats": self.repeats,
            "load_average": self.load,
        }


def _latency(
    run: _Run, subject: Subject, lengths: Lengths, peer: str | None, checkpoint: Path | None
) -> dict[str, Any]:
    import torch

    config = subject.config()
    works = lengths.workloads(config.build)
    source = None if peer is None else peer_source(peer, checkpoint, subject, config, run.device)
    run.warn()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=stderr(), transient=True) as bar:
        task = bar.add_task("memory")
        # First, while this process holds nothing: two copies of a large model may not fit on one GPU. There, PyTorch
        # counts by itself what is allocated, so that without a peer this process tells as much as another.
        aside = run.memory and (source is not None or not run.device.startswith("cuda"))
        memory = _memory(subject, works, run, source) if aside else {}
        bar.update(task, description="loading")
        runner = subject.load(run.device)
        rounding = _rounding(runner, works[0])
        other = None if source is None else load_peer(source, run.device)
        bandwidth = read_bandwidth(runner.device)
        prompts = any(work.is_prefill for work in works)
        operations = matrix_rate(runner.device, getattr(torch, runner.config.model.dtype)) if prompts else 0.0
        forget_device_peak(runner.device)
        rows = [Row(work, speed_limit(runner, work, bandwidth, operations)) for work in works]
        for row in rows:
            bar.update(task, description=row.work.name)
            _time(row, runner, other, run.repeats)
        if run.memory and not aside:
            memory = {"ours": of_this_process(runner)}
    return {
        **run.about(subject, runner),
        "peer": None if other is None else other.name,
        "int8_activations": rounding,
        "read_bandwidth": bandwidth,
        "matrix_rate": operations or None,
        "batch_speedup": batch_speedup(rows),
        "rows": [row.record() for row in rows],
        "memory": {name: asdict(found) for name, found in memory.items()},
    }


def _rounding(runner: ModelRunner, work: Workload) -> dict[str, Any] | None:
    """What activations that are rounded do to the logits of a prompt; None where none are. Before anything runs."""
    from trtllm_core.backends.torch.executable import TorchExecutable

    if not isinstance(runner.session.engine, TorchExecutable):
        return None
    import torch

    from trtllm_core.backends.torch.cpu.rounding import measure_rounding

    prompt = torch.tensor(work.prompts(runner.config.model.vocab_size)[0][:ROUNDING_TOKENS])
    if len(prompt) < 2:
        return None
    found = measure_rounding(runner.session.engine, prompt)
    if found is None:
        return None
    return {"tokens": len(prompt), "logits_error": found.error, "logits_spread": found.spread}


def _throughput(run: _Run, subject: Subject, trace: Trace, peer: str | None, checkpoint: Path | None) -> dict[str, Any]:
    config = subject.config()
    source = None if peer is None else peer_source(peer, checkpoint, subject, config, run.device)
    if source is not None and source.name != "transformers":
        raise ConfigError(f"the peer {source.name} serves no trace here: --mode throughput takes --peer transformers")
    run.warn()
    ours: list[serving.Served] = []
    theirs: list[serving.Served] = []
    slots = config.build.max_batch_size
    with (
        Progress(SpinnerColumn(), TextColumn("{task.description}"), console=stderr(), transient=True) as bar,
        ExitStack() as stack,
    ):
        bar.add_task("serving")
        runner = subject.load(run.device)
        other = None if source is None else ContinuousPeer(source, run.device, trace, slots)
        if other is not None:
            stack.callback(other.close)
        for _ in range(run.repeats + 1):
            ours.append(serving.serve(runner, trace))
            if other is not None:
                theirs.append(other.serve(trace))
    found = {**run.about(subject, runner), "slots": slots, "peer": None, **serving.record(trace, ours[1:])}
    if other is not None:
        found |= {"peer": other.name, "peer_record": serving.record(trace, theirs[1:])}
        found["ratio"] = found["output_tokens_per_s"] / found["peer_record"]["output_tokens_per_s"]
    return found


def _scale(run: _Run, engine: Path | None, what: SubjectOptions, work: WorkOptions) -> dict[str, Any]:
    batches, queues = work.scale(None)
    subject = subject_of(engine, what.shape, what.random(), scale.limits(batches), what.backend())
    batches, queues = work.scale(subject.config().build.max_batch_size)
    run.warn()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=stderr(), transient=True) as bar:
        bar.add_task("scale")
        runner = subject.load(run.device)
        steps = scale.step_costs(runner, batches, run.repeats)
        queue = scale.queue_costs(runner, queues)
    return {
        **run.about(subject, runner),
        "slots": runner.config.build.max_batch_size,
        "batches": steps,
        "queues": queue,
    }


def _check(mode: str, given: list[str], plot: Path | None) -> None:
    """Refuse a mode that is none, options that it would not honour, and pictures that could not be drawn."""
    if mode not in MODES:
        raise ConfigError(f"--mode {mode}: it is one of {', '.join(MODES)}")
    if plot is not None:
        given = [*given, "--plot"]
    if wrong := [name for name in given if name not in TAKES[mode]]:
        raise ConfigError(f"--mode {mode} does not take {', '.join(wrong)}")
    if plot is not None:
        check_plot(plot)


def _memory(subject: Subject, works: list[Workload], run: _Run, peer: PeerSource | None) -> dict[str, Footprint]:
    """Ours, then the peer's."""
    found = {"ours": measure(Job(subject.as_json(), works, run.threads, run.device))}
    if peer is not None:
        found[peer.name] = measure(Job(subject.as_json(), works, run.threads, run.device, asdict(peer)))
    return found


def _time(row: Row, runner: ModelRunner, peer: Peer | None, repeats: int) -> None:
    """Ours and the peer's in turns, so that a change of the machine's mood meets both. The first turn warms up."""
    for turn in range(repeats + 1):
        ours = time_engine(runner, row.work)
        theirs = None if peer is None else peer.time(row.work)
        if turn:
            row.ours.append(ours)
            row.peer += [] if theirs is None else [theirs]


def _load_average() -> float:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return 0.0


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
