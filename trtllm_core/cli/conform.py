"""``trtllm-core conform``: does a package keep the promises that its plugins make?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn

from trtllm_core.cli.console import print_json, print_table, stderr, stdout
from trtllm_core.cli.options import parse_use

if TYPE_CHECKING:
    from trtllm_core.testing.examine import Report


def conform(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="An installed distribution, or an entry point.")],
    params: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:JSON",
            help="Parameters to try a plugin with; of a model family, a small transformers config. May be repeated.",
        ),
    ] = None,
    sampling: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:JSON", help="Fields of SamplingConfig to try a plugin with. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine all plugins of a package by the kits of their kinds. Needs no test file. Status 1: something failed."""
    from trtllm_core.testing.examine import Wishes, examine

    wishes = Wishes(_by_name(params), _by_name(sampling))
    reports: list[Report] = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=stderr(), transient=True) as bar:
        task = bar.add_task(package)
        for report in examine(package, wishes):
            bar.update(task, description=report.name)
            reports.append(report)
    if as_json:
        print_json([{**asdict(report), "results": [asdict(result) for result in report.results]} for report in reports])
    else:
        _print(reports)
    if any(result.status == "failed" for report in reports for result in report.results):
        raise typer.Exit(1)


def _by_name(texts: list[str] | None) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for use in map(parse_use, texts or ()):
        found.setdefault(use.name, []).append(use.params)
    return found


_SIGNS = {"passed": "pass", "failed": "FAIL", "skipped": "-"}


def _print(reports: list[Report]) -> None:
    rows = [
        (report.name, report.kind.replace("_", " "), result.title, _SIGNS[result.status], result.why)
        for report in reports
        for result in report.results
    ]
    print_table(("plugin", "kind", "check", "", "why"), rows)
    counts = {status: sum(row[3] == sign for row in rows) for status, sign in _SIGNS.items()}
    colour = "red" if counts["failed"] else "green"
    said = f"{counts['passed']} checks passed, {counts['failed']} failed, {counts['skipped']} do not apply"
    stdout().print(f"[{colour}]{escape(said)}[/]")
