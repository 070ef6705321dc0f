"""Running a kit on a plugin without pytest."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_core.testing import Result, run_kit


def examine(kit: type[Any], plugin: Any, **attributes: Any) -> dict[str, Result]:
    """What became of each check of a kit."""
    made = type("Examined", (kit,), {"plugin": plugin, **attributes})
    return {result.check: result for result in run_kit(made)}


@pytest.fixture(scope="session", name="examine")
def _examine() -> Any:
    return examine
