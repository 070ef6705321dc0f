"""The command line, ``trtllm-core``: one module for each command. No torch is imported until a command needs it."""

from __future__ import annotations


def main() -> None:
    """Entry point of the command ``trtllm-core``."""
    from trtllm_core.cli.app import app

    app()
