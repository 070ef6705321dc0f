"""A few hundred requests of the soak test; ``python -m tests.soak --requests 20000`` runs as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import build, soak
from trtllm_core import Plugins


@pytest.mark.parametrize("look_ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("policy", ["paged", "prefix"])
def test_a_soak(tmp_path: Path, policy: str, look_ahead: bool) -> None:
    plugins = Plugins.load()
    done = soak(build(tmp_path, plugins), plugins, 200, seed=5, policy=policy, kinds=100, look_ahead=look_ahead)
    assert done.preemptions > 20, "or the pool was not too small"
    assert {"cancelled", "length", "plugin_error", *(() if look_ahead else ("refused",))} <= done.reasons.keys()
