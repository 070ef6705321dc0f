"""The modes of ``bench``: grids of lengths, prompts alone, a trace of requests; pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trtllm_core.cli.bench.scale import queue_costs
from trtllm_core.cli.bench.serving import record, serve
from trtllm_core.cli.bench.timing import gaps, percentile
from trtllm_core.cli.bench.trace import Arrival, Trace, make_trace, parse_range, read_trace
from trtllm_core.cli.bench.workloads import Lengths
from trtllm_core.config import BuildConfig
from trtllm_core.errors import ConfigError
from trtllm_core.runner import ModelRunner

FAST = ("--repeats", "1", "--no-memory")
THROUGHPUT = ("--mode", "throughput", "--repeats", "1")


def test_a_grid_of_batches_prompts_and_outputs(cli: Callable, tiny_engine: Path) -> None:
    grid = ("--batch", "1,3", "--prompt-len", "4,9", "--new-tokens", "3,5", "--prefill-len", "7,11")
    found = json.loads(cli("bench", tiny_engine, *grid, *FAST, "--json").stdout)
    rows = [(row["name"], row["batch"], row["prompt_len"], row["new_tokens"]) for row in found["rows"]]
    assert rows[:3] == [("prefill 7", 1, 7, 1), ("prefill 11", 1, 11, 1), ("decode, batch 1, 4 + 3", 1, 4, 3)]
    assert len(rows) == 2 + 2 * 2 * 2
    for row in found["rows"][2:]:
        assert row["first_token_ms"] > 0
        assert row["between_p99_ms"] >= row["between_p50_ms"] > 0


def test_prefill_alone(cli: Callable, tiny_engine: Path) -> None:
    prefill = ("--mode", "prefill", "--batch", "1,2", "--prefill-len", "8,16")
    found = json.loads(cli("bench", tiny_engine, *prefill, *FAST, "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["prefill 8", "prefill 16", "prefill 2 x 8", "prefill 2 x 16"]
    assert found["matrix_rate"] > 1e8
    assert all(0 < row["of_limit"] < 1 for row in found["rows"])
    assert found["batch_speedup"] is None
    assert "limit, prompts" in cli("bench", tiny_engine, *prefill, *FAST).stdout


def test_throughput(cli: Callable, tiny_engine: Path) -> None:
    """More requests than places, so that some wait."""
    asked = ("--requests", "7", "--prompts", "3-9", "--outputs", "2-5")
    found = json.loads(cli("bench", tiny_engine, *THROUGHPUT, *asked, "--json").stdout)
    trace = make_trace(7, (3, 9), (2, 5), None)
    assert (found["requests"], found["slots"]) == (7, 4)
    assert (found["prompt_tokens"], found["new_tokens"]) == (trace.prompt_tokens, trace.new_tokens)
    assert found["output_tokens_per_s"] > found["requests_per_s"] > 0
    assert found["first_token_p99_ms"] >= found["first_token_p50_ms"] > 0
    text = cli("bench", tiny_engine, *THROUGHPUT, *asked).stdout
    for expected in ("7 all at once", "4, of which a step ran", "first token", "between tokens"):
        assert expected in text


def test_every_token_of_a_trace_is_made_and_counted(tiny_engine: Path) -> None:
    runner = ModelRunner.from_dir(tiny_engine)
    trace = Trace((Arrival(0, 5, 3), Arrival(0, 2, 1), Arrival(0, 8, 6)))
    served = serve(runner, trace)
    assert served.tokens == trace.new_tokens == 10
    assert len(served.first) == 3
    assert len(served.gaps) == 2 + 0 + 5
    assert served.steps >= 6
    assert 0 < served.rows <= 3
    assert all(0 < one <= served.seconds for one in served.first)
    found = record(trace, [served])
    assert found["runs"] == [found["output_tokens_per_s"]] == [pytest.approx(10 / served.seconds)]


def test_requests_come_when_the_trace_says(tiny_engine: Path) -> None:
    runner = ModelRunner.from_dir(tiny_engine)
    served = serve(runner, Trace((Arrival(0, 5, 2), Arrival(0.4, 5, 2))))
    assert served.seconds > 0.4
    assert max(served.first) < 0.4  # counted from each one's own arrival
    again = serve(runner, Trace((Arrival(0, 5, 2),)))  # the runner is given back
    assert again.tokens == 2


def test_throughput_beside_continuous_batching(cli: Callable, tiny_engine: Path, tiny_checkpoint: Path) -> None:
    asked = ("--requests", "3", "--prompts", "3-9", "--outputs", "2-5", "--threads", "1")
    peer = ("--peer", "transformers", "--checkpoint", tiny_checkpoint)
    found = json.loads(cli("bench", tiny_engine, *THROUGHPUT, *asked, *peer, "--json").stdout)
    theirs = found["peer_record"]
    assert found["peer"].startswith("transformers ")
    assert found["ratio"] == pytest.approx(found["output_tokens_per_s"] / theirs["output_tokens_per_s"])
    assert theirs["first_token_p99_ms"] >= theirs["first_token_p50_ms"] > 0
    assert theirs["between_p50_ms"] > 0


def test_llama_cpp_serves_no_trace(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    peer = ("--peer", "llama.cpp", "--checkpoint", tmp_path / "x.gguf")
    error = cli("bench", tiny_engine, *THROUGHPUT, *peer, status=2).stderr
    assert "serves no trace here" in " ".join(error.split())


def test_scale(cli: Callable, tiny_engine: Path) -> None:
    found = json.loads(
        cli("bench", tiny_engine, "--mode", "scale", "--queue", "1,50", "--repeats", "1", "--json").stdout
    )
    assert [row["batch"] for row in found["batches"]] == [1, 4]  # as many as the engine takes
    assert [row["waiting"] for row in found["queues"]] == [1, 50]
    assert all(row["step_ms"] > 0 for row in (*found["batches"], *found["queues"]))
    text = cli("bench", tiny_engine, "--mode", "scale", "--batch", "2", "--queue", "3", "--repeats", "1").stdout
    for expected in ("a row, µs", "an arrival, µs", "4 sequences run, others wait"):
        assert expected in text


def test_a_queue_is_gone_after_it_was_measured(tiny_engine: Path) -> None:
    runner = ModelRunner.from_dir(tiny_engine)
    slots = runner.generation.loop.branches.slots
    free = slots.free
    queue_costs(runner, [5])
    assert slots.free == free
    assert runner.generate([[1, 2]], max_new_tokens=2, end_id=()).shape == (1, 1, 4)


def test_a_trace_from_a_file(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    lines = [{"arrival": 0, "prompt_len": 5, "new_tokens": 2}, {"arrival": 0, "prompt_len": 7, "new_tokens": 3}]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_trace(path) == Trace((Arrival(0.0, 5, 2), Arrival(0.0, 7, 3)))
    found = json.loads(cli("bench", tiny_engine, *THROUGHPUT, "--trace", path, "--json").stdout)
    assert (found["requests"], found["prompt_tokens"], found["new_tokens"]) == (2, 12, 5)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1, 2]",
        '{"arrival": 0, "prompt_len": 5}',
        '{"arrival": -1, "prompt_len": 5, "new_tokens": 2}',
        '{"arrival": 0, "prompt_len": 0, "new_tokens": 2}',
        '{"arrival": 0, "prompt_len": 5, "new_tokens": 2, "user": 1}',
    ],
)
def test_a_line_that_is_no_request(line: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(f'{{"arrival": 0, "prompt_len": 5, "new_tokens": 2}}\n{line}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_trace(path)


def test_traces_are_drawn_alike() -> None:
    trace = make_trace(200, (3, 9), (2, 5), 10.0)
    assert trace == make_trace(200, (3, 9), (2, 5), 10.0)
    assert {one.prompt_len for one in trace.requests} == set(range(3, 10))
    assert {one.new_tokens for one in trace.requests} == set(range(2, 6))
    assert 10 < trace.spread < 40  # 200 requests at 10 a second
    assert make_trace(5, (1, 1), (1, 1), None).spread == 0
    assert parse_range("32-512", "x") == (32, 512)
    assert parse_range("7", "x") == (7, 7)


def test_an_engine_made_for_the_work_has_room_for_all_of_it() -> None:
    lengths = Lengths([1, 16], [100, 300], [20, 50], [200], [2])
    build = BuildConfig(**lengths.limits())
    assert (build.max_batch_size, build.max_input_len, build.max_seq_len) == (16, 300, 350)
    assert len(lengths.workloads(build)) == 1 + 2 * 2 * 2
    alone = Lengths(batches=(), prefills=(40,)).limits()
    assert (alone["max_batch_size"], alone["max_input_len"], alone["max_seq_len"]) == (1, 40, 41)
    trace = make_trace(4, (6, 6), (3, 3), None).limits(2)
    assert (trace["max_batch_size"], trace["max_input_len"], trace["max_seq_len"]) == (2, 6, 9)


def test_percentiles_and_gaps() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0
    hundred = [float(i) for i in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert gaps([[1.0, 1.5, 3.0], [2.0]]) == (0.5, 1.5)


def test_a_picture(cli: Callable, tiny_engine: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = ("--batch", "1,2", "--prompt-len", "4", "--new-tokens", "3", "--prefill-len", "8")
    cli("bench", tiny_engine, *small, *FAST, "--plot", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "speed"], "it is one of latency, prefill, throughput, scale"),
        (["--requests", "3"], "--mode latency does not take --requests"),
        (["--mode", "throughput", "--batch", "2"], "does not take --batch"),
        (["--mode", "throughput", "--plot", "x.png"], "does not take --plot"),
        (["--mode", "throughput", "--requests", "0"], "are above 0"),
        (["--mode", "throughput", "--prompts", "9-3"], "its end is not before its start"),
        (["--mode", "throughput", "--prompts", "x"], "write a range as 32-512"),
        (["--mode", "throughput", "--trace", "x", "--rate", "3"], "leave --rate out"),
        (["--mode", "throughput", "--slots", "3"], "--slots is for random weights"),
        (["--mode", "prefill", "--new-tokens", "3"], "does not take --new-tokens"),
        (["--mode", "scale", "--peer", "transformers"], "does not take --peer"),
        (["--mode", "scale", "--plot", "x.png"], "does not take --plot"),
        (["--queue", "3"], "--mode latency does not take --queue"),
        (["--mode", "scale", "--queue", "0"], "at least 1"),
        (["--new-tokens", "1"], "at least 2"),
        (["--plot", "x.jpg"], "ends in .png"),
        (["--plot", "no/such/x.png"], "no directory no/such"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], message: str, cli: Callable, tiny_engine: Path) -> None:
    assert message in " ".join(cli("bench", tiny_engine, *arguments, status=2).stderr.split())


def test_matplotlib_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, cli: Callable, tiny_engine: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = cli("bench", tiny_engine, "--plot", tmp_path / "x.png", status=2).stderr
    assert "pip install trtllm-core[bench]" in error


def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch, cli: Callable, tiny_engine: Path) -> None:
    small = ("--batch", "1", "--prompt-len", "4", "--new-tokens", "3", "--prefill-len", "8", "--json")
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    busy = cli("bench", tiny_engine, *small, *FAST)
    assert "this machine is busy (load average 99.0" in busy.stderr
    assert json.loads(busy.stdout)["load_average"] == 99.0
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert "busy" not in cli("bench", tiny_engine, *small, *FAST).stderr
