"""Two ranks end a request at the same token, by rank 0's clock."""

from __future__ import annotations

from itertools import count, repeat
from pathlib import Path

from trtllm_core import BuildConfig, GenerationSession, Mapping, SamplingConfig, build_engine
from trtllm_core.parallel import TensorParallel, run_ranks
from trtllm_core.session import Session
from trtllm_core.testing.checkpoints import write_llama


def ending(parallel: TensorParallel, engine: Path) -> tuple[str, int]:
    """How a request ends that may take 3 s, by a clock of 1 s a reading, or of none."""
    ticks = count() if parallel.rank == 0 else repeat(0)
    mapping = Mapping(world_size=2, rank=parallel.rank, tp_size=2)
    session = Session.from_directory(engine, parallel.rank, parallel=parallel)
    with GenerationSession(None, session, mapping, clock=lambda: float(next(ticks))) as generation:
        config = SamplingConfig(max_new_tokens=8, max_time=3.0, end_id=(), return_dict=True)
        (output,) = generation.decode_batch([[1, 2, 3]], config)["outputs"]
    return output.finish_reason, len(output.tokens)


def test_rank_0_s_clock_counts_on_both(tmp_path: Path) -> None:
    build_engine(write_llama(tmp_path / "hf"), tmp_path / "engine", BuildConfig(tp_size=2, max_seq_len=64))
    ranks = run_ranks(ending, 2, tmp_path / "engine", timeout=120, backend="gloo")
    assert ranks == [("timed_out", 3)] * 2
