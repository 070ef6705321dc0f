"""What each workload came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trtllm_core.cli.bench.timing import Timing, median, percentile
from trtllm_core.cli.bench.workloads import Workload


@dataclass
class Row:
    """One workload's runs, in the order in which they were taken."""

    work: Workload
    limit: float | None = None
    """Tokens a second that memory, or of prompts arithmetic, allows; None: nobody knows."""
    ours: list[Timing] = field(default_factory=list)
    peer: list[Timing] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For ``--json``: rates in tokens a second, times in milliseconds."""
        ours_runs, peer_runs = ([one.rate(self.work) for one in side] for side in (self.ours, self.peer))
        ours, peer = median(ours_runs), median(peer_runs)
        gaps = [gap for one in self.ours for gap in one.gaps]
        return {
            **asdict(self.work),
            "ours": ours,
            "peer": peer,
            "ratio": ours / peer if ours and peer else None,
            "limit": self.limit,
            "of_limit": ours / self.limit if ours and self.limit else None,
            "first_token_ms": _ms(median([one.prefill_seconds for one in self.ours])),
            "peer_first_token_ms": _ms(median([one.prefill_seconds for one in self.peer])),
            "between_p50_ms": _ms(percentile(gaps, 0.5)),
            "between_p99_ms": _ms(percentile(gaps, 0.99)),
            "cpu_ms_per_token": _cpu_ms(self.ours),
            "peer_cpu_ms_per_token": _cpu_ms(self.peer),
            "ours_runs": ours_runs,
            "peer_runs": peer_runs,
        }


def batch_speedup(rows: Sequence[Row]) -> float | None:
    """The largest batch's rate over that of batch 1, at the first of the lengths."""
    decodes = [row for row in rows if not row.work.is_prefill]
    lengths = [(row.work.prompt_len, row.work.new_tokens) for row in decodes][:1]
    rates = {
        row.work.batch: row.record()["ours"]
        for row in decodes
        if [(row.work.prompt_len, row.work.new_tokens)] == lengths
    }
    one, most = rates.get(1), rates.get(max(rates, default=1))
    return most / one if one and most and len(rates) > 1 else None


def _cpu_ms(runs: Sequence[Timing]) -> float | None:
    return _ms(median([one.cpu_seconds / one.decode_tokens for one in runs if one.decode_tokens]))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
