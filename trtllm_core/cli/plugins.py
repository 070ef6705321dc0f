"""``trtllm-core plugins``: what is installed, and what became of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from trtllm_core.cli.console import print_json, print_table


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the installed plugins: loaded, disabled or failed, and why."""
    from trtllm_core.plugin import Plugins

    reports = Plugins.load().report()
    if as_json:
        print_json([asdict(report) for report in reports])
        return
    headers = ("plugin", "distribution", "version", "hooks", "status", "why")
    print_table(headers, [(r.plugin, r.distribution, r.version, "\n".join(r.hooks), r.status, r.why) for r in reports])
