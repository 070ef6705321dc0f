"""``bench``: that its numbers are about the right thing. How large they are is nobody's promise here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trtllm_core.cli.bench.bandwidth import read_bandwidth
from trtllm_core.cli.bench.limits import _pairs, prompt_operations, speed_limit, step_bytes
from trtllm_core.cli.bench.peers import find_checkpoint
from trtllm_core.cli.bench.rows import Row
from trtllm_core.cli.bench.timing import Timing, peak_memory, time_engine
from trtllm_core.cli.bench.workloads import Workload
from trtllm_core.errors import ConfigError
from trtllm_core.runner import ModelRunner

SMALL = ("--repeats", "2", "--new-tokens", "6", "--prompt-len", "8", "--prefill-len", "16")


def test_bench_alone(cli: Callable, tiny_engine: Path) -> None:
    out = cli("bench", tiny_engine, *SMALL).stdout
    for text in (
        "prefill 16",
        "decode, batch 1",
        "decode, batch 4",
        "of limit",
        "first token",
        "p99",
        "batching",
        "peak memory, ours",
    ):
        assert text in out
    assert "ratio" not in out


def test_bench_with_a_peer(cli: Callable, tiny_engine: Path, tiny_checkpoint: Path) -> None:
    peer = ("--peer", "transformers", "--checkpoint", tiny_checkpoint, "--batch", "1,3", "--threads", "1", "--json")
    found = json.loads(cli("bench", tiny_engine, *SMALL, *peer).stdout)
    assert [row["name"] for row in found["rows"]] == ["prefill 16", "decode, batch 1", "decode, batch 3"]
    for row in found["rows"]:
        assert len(row["ours_runs"]) == len(row["peer_runs"]) == 2
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    assert found["rows"][0]["cpu_ms_per_token"] is None
    assert found["rows"][0]["of_limit"] > 0
    assert min(found["rows"][1]["cpu_ms_per_token"], found["rows"][1]["peer_cpu_ms_per_token"]) > 0
    assert found["rows"][1]["of_limit"] > 0
    assert found["peer"].startswith("transformers ")
    assert found["threads"] == 1
    runner = ModelRunner.from_dir(tiny_engine)
    ours = found["memory"]["ours"]
    assert (ours["weights"], ours["kv"]) == (runner.context_mem_size, runner.generation.loop.cache.bytes)
    assert ours["peak"] > ours["imported"] > 0
    assert "transformers" in found["memory"]


def test_the_peer_does_the_same_work(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    """Same weights, same prompts: the greedy tokens must be the same, or the comparison means nothing."""
    import torch
    import transformers

    work = Workload("x", 2, 8, 6)
    runner = ModelRunner.from_dir(tiny_engine)
    prompts = work.prompts(256)
    ours = runner.generate(prompts, max_new_tokens=6, end_id=())[:, 0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    theirs = model.generate(torch.tensor(prompts), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.long(), theirs)


def test_a_timing_counts_tokens_after_the_first(tiny_engine: Path) -> None:
    runner = ModelRunner.from_dir(tiny_engine)
    timing = time_engine(runner, Workload("x", 3, 8, 6))
    assert timing.decode_tokens == 3 * 5
    assert timing.prefill_seconds > 0
    assert timing.decode_seconds > 0
    assert Timing(0.5, 0.0, 0).rate(Workload("x", 2, 10, 1)) == 40
    assert Timing(0.5, 2.0, 8).rate(Workload("x", 2, 10, 5)) == 4


def test_the_limit_counts_weights_and_cache(tiny_engine: Path) -> None:
    runner = ModelRunner.from_dir(tiny_engine)
    table = 256 * 64 * 4  # the embedding, of which a step reads a row for each sequence: this model has a head too
    expected = runner.context_mem_size - table + 2 * (8 + 3) * 512
    assert step_bytes(runner, Workload("x", 2, 8, 6)) == expected
    assert read_bandwidth(runner.device, 1) > 1e8
    assert peak_memory() > 1e7


def test_the_limit_of_prompts_counts_products_and_attention(tiny_engine: Path) -> None:
    runner = ModelRunner.from_dir(tiny_engine)
    work = Workload("x", 3, 8, 1)
    model = runner.config.model
    layer = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 128
    operations = 2 * 8 * model.num_layers * layer + 2 * 256 * 64 + 4 * model.num_layers * 64 * (8 * 9 / 2)
    assert prompt_operations(runner, work) == 3 * operations
    assert speed_limit(runner, work, 1.0, 6e6) == pytest.approx(24 * 6e6 / (3 * operations))
    assert _pairs(8, None) == _pairs(8, 9) == 36
    assert _pairs(8, 3) == 1 + 2 + 3 * 6


def test_prompts_are_the_same_in_every_process() -> None:
    work = Workload("x", 2, 5, 1)
    assert work.prompts(100) == work.prompts(100)
    assert all(0 <= token < 100 for prompt in work.prompts(100) for token in prompt)


def test_a_row_without_a_peer() -> None:
    runs = [Timing(seconds, 0, 0) for seconds in (1.0, 0.25, 0.5)]
    record = Row(Workload("x", 1, 1, 1), None, runs).record()
    assert record["first_token_ms"] == 500
    assert (record["ours"], record["peer"], record["ratio"], record["of_limit"]) == (2.0, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,x"], "write sizes as 1,8"),
        (["--batch", "0"], "at least 1"),
        (["--batch", "9"], "max_batch_size 4"),
        (["--prefill-len", "100"], "at most 96"),
        (["--peer", "vllm"], "there is no peer 'vllm'"),
        (["--peer", "transformers", "--checkpoint", "no/such"], "no checkpoint at no/such"),
    ],
)
def test_refusals(arguments: list[str], message: str, cli: Callable, tiny_engine: Path, tiny_checkpoint: Path) -> None:
    assert tiny_checkpoint.name == "tiny"  # beside the engine, where a peer looks for it
    assert message in cli("bench", tiny_engine, *SMALL[:4], *arguments, status=2).stderr


def test_a_peer_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, cli: Callable, tiny_engine: Path, tiny_checkpoint: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = cli(
        "bench", tiny_engine, "--peer", "transformers", "--checkpoint", tiny_checkpoint, "--no-memory", status=2
    ).stderr
    assert "pip install trtllm-core[bench]" in error


def test_a_checkpoint_is_found_beside_the_engine(tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert find_checkpoint(None, tiny_engine, "tiny") == tiny_checkpoint.resolve()
    for source in ("", "gone"):
        with pytest.raises(ConfigError, match="use --checkpoint"):
            find_checkpoint(None, tmp_path / "engine", source)
