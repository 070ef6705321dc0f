"""The comparison that the README quotes runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMPARE = Path(__file__).with_name("compare.py")


def test_compare() -> None:
    done = subprocess.run(
        [sys.executable, str(COMPARE), "--vocab", "400", "--schemas", "2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for what in ("llguidance ", "xgrammar", "compile a schema", "mask, along a random walk", "give 3 tokens back"):
        assert what in done.stdout
