"""``trtllm-core bench-plugin``: what it measures, prints and refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from trtllm_core.cli.app import app

QUICK = ("--vocab", "300", "--batch", "1,3", "--steps", "4", "--prompt-len", "5")


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench-plugin", *arguments])


def costs(*arguments: str) -> dict[tuple[str, int], dict[str, float]]:
    done = bench(*arguments, *QUICK, "--json")
    assert done.exit_code == 0, done.output
    return {(cost["method"], cost["rows"]): cost for cost in json.loads(done.stdout)["costs"]}


@pytest.mark.parametrize(
    ("plugin", "methods"),
    [
        ("penalties", {"apply", "commit"}),
        ("stop_words", {"check", "commit"}),
        ("stop_strings", {"check", "commit"}),
        ("top_k_top_p", {"sample", "commit"}),
    ],
)
def test_what_is_measured(plugin: str, methods: set[str]) -> None:
    found = costs(plugin)
    assert {(method, rows) for method in methods for rows in (1, 3)} <= found.keys()
    for (_, rows), cost in found.items():
        assert cost["row"] == pytest.approx(cost["step"] / rows)
        assert 0 < cost["step"] < 1


def test_fields_of_the_request_count() -> None:
    assert "commit" in {method for method, _ in costs("stop_strings", "--set", 'stop_strings=["abc"]')}


def test_the_table() -> None:
    done = bench("penalties", *QUICK)
    assert "penalties of trtllm-core" in done.stdout
    assert "300 tokens on cpu, 1 thread" in " ".join(done.stdout.split())
    assert "µs a row" in done.stdout


def test_a_budget_that_is_not_kept_is_status_1() -> None:
    assert bench("penalties", *QUICK, "--budget", "1e9").exit_code == 0
    assert bench("penalties", *QUICK, "--budget", "0").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("penaltys",), "did you mean the logits processor 'penalties'?"),
        (("penalties", "--kind", "decoder"), "no decoder 'penalties' is registered"),
        (("penalties", "--kind", "sampler"), "choose logits_processor, stopping_criterion, decoder"),
        (("penalties", "--batch", "0"), "sizes are at least 1"),
        (("penalties", "--batch", "many"), "write sizes as 1,8"),
        (('penalties:{"a": 1}',), "takes no parameters"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = bench(*arguments, "--vocab", "300")
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
