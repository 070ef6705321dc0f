"""Running a kit on a plugin without pytest; and the modules beside the tests can be imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trtllm_core.testing import Result, run_kit

sys.path.insert(0, str(Path(__file__).parent))


def examine(kit: type[Any], plugin: Any, check: str | None = None, **attributes: Any) -> dict[str, Result]:
    """What became of each check of a kit, or of one of them."""
    made = type("Examined", (kit,), {"plugin": plugin, **attributes})
    return {result.check: result for result in run_kit(made, None if check is None else [check])}


@pytest.fixture(scope="session")
def assert_found() -> Any:
    """``check(kit, plugin, check, why)``: that check of the kit fails for the plugin, and says ``why``."""

    def assert_found(kit: type[Any], plugin: Any, check: str, why: str, **attributes: Any) -> None:
        result = examine(kit, plugin, check, **attributes)[check]
        assert result.status == "failed", result.why
        assert why in result.why

    return assert_found


@pytest.fixture(scope="session", name="examine")
def _examine() -> Any:
    return examine
