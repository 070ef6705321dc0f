"""The numbers of ``bench`` for people."""

from __future__ import annotations

from typing import Any

from trtllm_core.cli.console import print_facts, print_table, size


def print_latency(found: dict[str, Any]) -> None:
    """Rates beside the limit and the peer, waiting times, and memory."""
    peer = (found["peer"] or "").split(" ")[0]
    waits = ["first token", *([f"{peer}'s"] if peer else []), "between, p50", "p99"]
    headers = ["tokens/s", "ours", *([peer, "ratio"] if peer else []), "limit", "of limit", *waits]
    cells = []
    for row in found["rows"]:
        theirs = [_number(row["peer"]), _number(row["ratio"], "x", 2)] if peer else []
        share = None if row["of_limit"] is None else 100 * row["of_limit"]
        wait = [_ms(row["first_token_ms"]), *([_ms(row["peer_first_token_ms"])] if peer else [])]
        wait += [_ms(row["between_p50_ms"]), _ms(row["between_p99_ms"])]
        cells.append([row["name"], _number(row["ours"]), *theirs, _number(row["limit"]), _number(share, "%", 0), *wait])
    print_table(headers, cells, f"{_title(found)}, medians of {found['repeats']}")
    speedup, lines = found["batch_speedup"], list[tuple[str, str]]()
    if peer:
        lines.append(("peer", found["peer"]))
    if speedup is not None:
        lines.append(("batching", f"the largest batch decodes {speedup:.2f} times as fast as batch 1"))
    if found["matrix_rate"]:
        lines.append(("limit, prompts", f"their products at {found['matrix_rate'] / 1e12:.2f} TFLOP/s, as measured"))
    if any(row["new_tokens"] > 1 for row in found["rows"]):
        lines.append(("limit, decode", f"weights and KV read once a step at {found['read_bandwidth'] / 1e9:.1f} GB/s"))
    if found["int8_activations"]:
        one = found["int8_activations"]
        error, spread = one["logits_error"], one["logits_spread"]
        lines.append(
            ("activations", f"int8 for few rows: logits off by {error:.3f}, which spread by {spread:.3f}, in a prompt")
        )
    for name, one in found["memory"].items():
        lines += _memory(name, one, found["device"])
    print_facts(lines)


def print_throughput(found: dict[str, Any]) -> None:
    """What a trace of requests came to."""
    over = "all at once" if not found["arrivals_over_s"] else f"over {found['arrivals_over_s']:.1f} s"
    prompts, new = found["prompt_tokens"], found["new_tokens"]
    sides = [("", found), *([(f", {found['peer'].split(' ')[0]}", found["peer_record"])] if found["peer"] else [])]
    lines = [
        ("measured", f"{_title(found)}, medians of {found['repeats']}"),
        ("requests", f"{found['requests']} {over}: {prompts} prompt tokens, {new} new ones"),
        ("slots", f"{found['slots']}, of which a step ran {found['rows_per_step']:.1f}; {found['steps']:.0f} steps"),
    ]
    for name, one in sides:
        lines += [
            (f"output{name}", f"{one['output_tokens_per_s']:.1f} tokens/s, {one['requests_per_s']:.2f} requests/s"),
            (f"first token{name}", f"p50 {_ms(one['first_token_p50_ms'])}, p99 {_ms(one['first_token_p99_ms'])}"),
            (f"between tokens{name}", f"p50 {_ms(one['between_p50_ms'])}, p99 {_ms(one['between_p99_ms'])}"),
        ]
    if found["peer"]:
        lines.append(("ratio", f"{found['ratio']:.2f} times the output of {found['peer']}"))
    print_facts(lines)


def print_scale(found: dict[str, Any]) -> None:
    """A step by its batch, and by the queue behind it."""
    rows = [[str(one["batch"]), f"{one['step_ms']:.3f}", f"{one['us_per_row']:.1f}"] for one in found["batches"]]
    print_table(["batch", "a step, ms", "a row, µs"], rows, f"{_title(found)}, medians of {found['repeats']}")
    rows = [[str(one["waiting"]), f"{one['step_ms']:.3f}", f"{one['arrival_us']:.1f}"] for one in found["queues"]]
    print_table(["waiting", "a step, ms", "an arrival, µs"], rows, f"{found['slots']} sequences run, others wait")


def _title(found: dict[str, Any]) -> str:
    weights = f", {found['quantization']} weights" if found["quantization"] else ""
    kv = f", {found['kv_dtype']} KV cache" if found["kv_dtype"] != found["dtype"] else ""
    return f"{found['name']}: {found['dtype']}{weights}{kv} on {found['device']}, {found['threads']} threads"


def _memory(name: str, found: dict[str, Any], device: str) -> list[tuple[str, str]]:
    on_device = found["device_peak"]
    own = f", of which {size(found['weights'])} weights and {size(found['kv'])} KV" if found["weights"] else ""
    base = f"{size(found['imported'])} before loading"
    if on_device:
        return [(f"peak memory, {name}", f"{size(on_device)} on {device}{own}")]
    return [(f"peak memory, {name}", f"{size(found['peak'])} resident ({base}{own})")]


def _number(value: float | None, unit: str = "", digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def _ms(value: float | None) -> str:
    return _number(value, " ms")
