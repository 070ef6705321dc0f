"""``trtllm-core bench``: how fast an engine is here, beside the machine's limit and a peer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from trtllm_core.cli.bandwidth import read_bandwidth
from trtllm_core.cli.console import print_facts, print_json, print_table, size, stderr
from trtllm_core.cli.footprint import Footprint
from trtllm_core.cli.footprint import Job as MemoryJob
from trtllm_core.cli.footprint import measure as measure_memory
from trtllm_core.cli.measure import Workload, median, step_bytes, time_engine
from trtllm_core.cli.options import parse_sizes
from trtllm_core.cli.peers import Peer, PeerSource, load_peer, peer_source
from trtllm_core.cli.subject import Subject, subject_of
from trtllm_core.cli.workloads import Lengths

if TYPE_CHECKING:
    from trtllm_core.runner import ModelRunner


@dataclass
class Row:
    """What one workload came to, in tokens a second."""

    work: Workload
    limit: float | None = None
    """What the memory bandwidth allows; None where something else is the limit."""
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For ``--json``."""
        ours, peer = median(self.ours), median(self.peer)
        return {
            **asdict(self.work),
            "ours": ours,
            "peer": peer,
            "ratio": ours / peer if ours and peer else None,
            "limit": self.limit,
            "of_limit": ours / self.limit if ours and self.limit else None,
            "ours_runs": self.ours,
            "peer_runs": self.peer,
        }


def bench(
    engine: Annotated[
        Path | None, typer.Argument(metavar="[ENGINE]", help="An engine that `trtllm-core build` made.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Instead: random weights of a model such as llama-3-8b.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of random weights (default: the model's own).")] = None,
    peer: Annotated[str | None, typer.Option(help="Compare with it: transformers.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The peer's weights (default: beside the engine).")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes to decode (default: 1,8).")] = None,
    prompt_len: Annotated[int | None, typer.Option(help="Prompt when decoding (default: 128).", min=1)] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=2)] = 64,
    prefill_len: Annotated[int | None, typer.Option(help="Prompt when reading (default: 512).", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each; the median counts.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: PyTorch's).", min=1)] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in a process of its own.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure prefill, decoding and memory, side by side with a peer on the same weights and threads."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    asked = Lengths(None if batch is None else parse_sizes(batch, "--batch"), prompt_len, new_tokens, prefill_len)
    subject = subject_of(engine, shape, dtype, asked.limits())
    config = subject.config()
    works = asked.workloads(config.build)
    source = None if peer is None else peer_source(peer, checkpoint, subject, config)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=stderr(), transient=True) as bar:
        task = bar.add_task("memory")
        # First, while this process holds nothing: two copies of a large model do not fit on one GPU.
        footprints = _memory(subject, works, threads, device, source) if memory else []
        bar.update(task, description="loading")
        runner = subject.load(device)
        other = None if source is None else load_peer(source, device)
        bandwidth = read_bandwidth(runner.device)
        rows = [Row(work, None if work.is_prefill else _limit(runner, work, bandwidth)) for work in works]
        for row in rows:
            bar.update(task, description=row.work.name)
            _time(row, runner, other, repeats)
    about = {
        "name": subject.name,
        "engine": subject.engine or None,
        "shape": subject.shape or None,
        "dtype": config.model.dtype,
        "device": str(runner.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peer": None if other is None else other.name,
        "repeats": repeats,
        "read_bandwidth": bandwidth,
        "batch_speedup": _speedup(rows),
    }
    if as_json:
        records = {
            "rows": [row.record() for row in rows],
            "memory": {name: asdict(found) for name, found in footprints},
        }
        print_json({**about, **records})
    else:
        _print(about, rows, footprints)


def _memory(
    subject: Subject, works: list[Workload], threads: int | None, device: str, peer: PeerSource | None
) -> list[tuple[str, Footprint]]:
    """Ours, then the peer's."""
    found = [("ours", measure_memory(MemoryJob(subject.as_json(), works, threads, device)))]
    if peer is not None:
        job = MemoryJob(subject.as_json(), works, threads, device, asdict(peer))
        found.append((peer.name, measure_memory(job)))
    return found


def _time(row: Row, runner: ModelRunner, peer: Peer | None, repeats: int) -> None:
    """Ours and the peer's in turns, so that a change of the machine's mood meets both. The first turn warms up."""
    for turn in range(repeats + 1):
        ours = row.work.rate(time_engine(runner, row.work))
        theirs = None if peer is None else row.work.rate(peer.time(row.work))
        if turn:
            row.ours.append(ours)
            row.peer += [] if theirs is None else [theirs]


def _limit(runner: ModelRunner, work: Workload, bandwidth: float) -> float:
    return work.batch * bandwidth / step_bytes(runner, work)


def _speedup(rows: list[Row]) -> float | None:
    """The largest batch's rate over that of batch 1."""
    decodes = {row.work.batch: median(row.ours) for row in rows if not row.work.is_prefill}
    one, most = decodes.get(1), decodes[max(decodes)]
    return most / one if one and most and len(decodes) > 1 else None


def _print(about: dict[str, Any], rows: list[Row], memory: list[tuple[str, Footprint]]) -> None:
    peer = about["peer"]
    headers = ["tokens/s", "ours", *([peer, "ratio"] if peer else []), "limit", "of limit"]
    cells = []
    for record in (row.record() for row in rows):
        theirs = [_number(record["peer"]), _number(record["ratio"], "x", 2)] if peer else []
        share = None if record["of_limit"] is None else 100 * record["of_limit"]
        cells.append(
            [record["name"], _number(record["ours"]), *theirs, _number(record["limit"]), _number(share, "%", 0)]
        )
    title = f"{about['name']}: {about['dtype']} on {about['device']}, {about['threads']} threads"
    print_table(headers, cells, f"{title}, medians of {about['repeats']}")
    speedup = about["batch_speedup"]
    lines = (
        [] if speedup is None else [("batching", f"the largest batch decodes {speedup:.2f} times as fast as batch 1")]
    )
    lines.append(("limit", f"weights and KV read once a step at {about['read_bandwidth'] / 1e9:.1f} GB/s"))
    for name, found in memory:
        if found.device_peak:
            lines.append((f"peak memory, {name}", f"{size(found.device_peak)} on {about['device']}"))
        own = f", of which {size(found.weights)} weights and {size(found.kv)} KV" if found.weights else ""
        base = f"{size(found.imported)} before loading"
        lines.append(
            (f"peak {'host ' if found.device_peak else ''}memory, {name}", f"{size(found.peak)} resident ({base}{own})")
        )
    print_facts(lines)


def _number(value: float | None, unit: str = "", digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"
