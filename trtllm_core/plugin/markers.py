"""The pluggy markers of this project and the versions of its hooks."""

from __future__ import annotations

import pluggy

PROJECT = "trtllm_core"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

HOOK_VERSIONS: dict[str, str] = {
    "model_family": "1.0",
    "decoder": "1.1",
    "logits_processor": "1.0",
    "stopping_criterion": "1.0",
    "kv_policy": "1.0",
    "backend": "1.0",
    "observer": "1.1",
}
"""Version ``MAJOR.MINOR`` of each hook kind that this core offers. A minor only adds; a major may break."""
