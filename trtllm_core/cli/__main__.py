"""``python -m trtllm_core.cli``: the command without its script."""

from __future__ import annotations

from trtllm_core.cli import main

main()
